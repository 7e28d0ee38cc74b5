"""OpenVINO's intermediate representation, run by OpenVINO."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any


def convert(program: Any, path: str) -> None:
    """Write the graph, and the weights in 32 bits beside it."""
    import openvino

    openvino.save_model(openvino.convert_model(program), path, compress_to_fp16=False)


def run(path: str, batches: list) -> list:
    """The outputs for each batch, in 32 bits; by default some processors compute in bfloat16."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [[value.copy() for value in compiled(batch).values()] for batch in batches]
