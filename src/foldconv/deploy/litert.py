"""LiteRT (TensorFlow Lite); its converter needs an older torch, so both run in an environment of their own."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any


def convert(program: Any, path: str) -> None:
    """Write one file."""
    import litert_torch

    network = program.module().requires_grad_(False)
    litert_torch.convert(network, program.example_inputs[0]).export(path)


def run(path: str, batches: list) -> list:
    """The outputs for each batch; the inputs keep torch's order of dimensions."""
    return list(map(load(path), batches))


def load(path: str, threads: int = 0) -> Any:
    """What computes the outputs of a batch; by so many threads, 0: as the runtime thinks best."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads or None)

    def call(batch: list) -> list:
        runner = interpreter.get_signature_runner()
        names = sorted(runner.get_input_details(), key=lambda name: int(name.rpartition("_")[2]))
        results = runner(**dict(zip(names, batch)))
        order = sorted(results, key=lambda name: int(name.rpartition("_")[2]))
        return [results[name] for name in order]

    return call
