"""ExecuTorch with XNNPACK, run by ExecuTorch's own bindings."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any


def convert(program: Any, path: str) -> None:
    """Write one file; what XNNPACK does not know runs by the portable operators."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with open(path, "wb") as file:
        lowered.write_to_file(file)


def run(path: str, batches: list) -> list:
    """The outputs for each batch."""
    return list(map(load(path), batches))


def load(path: str, threads: int = 0) -> Any:
    """What computes the outputs of a batch; by so many threads, 0: as the runtime thinks best."""
    import torch
    from executorch.runtime import Runtime

    if threads:
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")

    def call(batch: list) -> list:
        values = method.execute([torch.from_numpy(array) for array in batch])
        return [value.numpy().copy() for value in values]

    call.program = program  # which the method needs  # pyright: ignore[reportFunctionMemberAccess]
    return call
