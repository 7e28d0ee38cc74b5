"""LiteRT (TensorFlow Lite); its converter needs an older torch, so both run in an environment of their own."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any


def convert(program: Any, path: str) -> None:
    """Write one file."""
    import litert_torch
    import torch
    from torch.utils._pytree import tree_leaves

    network = program.module().requires_grad_(False)

    class Flat(torch.nn.Module):
        def forward(self, *values: Any) -> Any:
            outputs = tree_leaves(network(*values))  # those of a dictionary would lose their order
            return tuple(outputs) if len(outputs) > 1 else outputs[0]

    litert_torch.convert(Flat().eval(), program.example_inputs[0]).export(path)


def run(path: str, batches: list) -> list:
    """The outputs for each batch; the inputs keep torch's order of dimensions."""
    return list(map(load(path), batches))


def load(path: str, threads: int = 0) -> Any:
    """What computes the outputs of a batch; by so many threads, 0: as the runtime thinks best."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads or None)

    def call(batch: list) -> list:
        runner = interpreter.get_signature_runner()
        # By the numbers in their names: an input that nobody reads is not among them.
        results = runner(**{name: batch[_number(name)] for name in runner.get_input_details()})
        return [results[name] for name in sorted(results, key=_number)]

    return call


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])
