"""ONNX, run by ONNX Runtime."""

# Runtimes are not installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any


def convert(program: Any, path: str) -> None:
    """Write one file, which holds the weights too."""
    import torch

    torch.onnx.export(program, (), path, external_data=False, verbose=False, dynamo=True)


def describe(path: str, text: str) -> None:
    """Put a description where ONNX has a place for it."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"foldconv": text})
    onnx.save(model, path)


def description(path: str) -> str:
    """What `describe` put there."""
    import onnx

    found = [prop.value for prop in onnx.load(path).metadata_props if prop.key == "foldconv"]
    return found[0] if found else "{}"


def run(path: str, batches: list) -> list:
    """The outputs for each batch."""
    return list(map(load(path), batches))


def load(path: str, threads: int = 0) -> Any:
    """What computes the outputs of a batch; by so many threads, 0: as the runtime thinks best."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda batch: session.run(None, dict(zip(names, batch)))
