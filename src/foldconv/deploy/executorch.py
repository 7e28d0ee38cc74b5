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
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    outputs = []
    for batch in batches:
        values = method.execute([torch.from_numpy(array) for array in batch])
        outputs.append([value.numpy().copy() for value in values])
    return outputs
