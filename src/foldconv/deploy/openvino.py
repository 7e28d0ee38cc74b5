"""OpenVINO's intermediate representation, run by OpenVINO."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from typing import Any


def convert(program: Any, path: str) -> None:
    """Write the graph, and the weights in 32 bits beside it."""
    # It tells its maker of each import and conversion, unless the machine is said to run tests.
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        import openvino

        model = openvino.convert_model(program)
        if len(model.inputs) != len(program.graph_signature.user_inputs):
            raise ValueError("of its inputs one is read by nothing, and would be left out; leave it out of the network")
        openvino.save_model(model, path, compress_to_fp16=False)
    finally:
        del os.environ["CI"]
        if before is not None:
            os.environ["CI"] = before


def run(path: str, batches: list) -> list:
    """The outputs for each batch, in 32 bits; by default some processors compute in bfloat16."""
    return list(map(load(path), batches))


def load(path: str, threads: int = 0) -> Any:
    """What computes the outputs of a batch; by so many threads, 0: as the runtime thinks best."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda batch: [value.copy() for value in compiled(batch).values()]
