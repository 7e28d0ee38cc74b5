"""Core ML: written anywhere, run on a Mac."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any


def convert(program: Any, path: str) -> None:
    """Write a package, a folder, in 32 bits."""
    import coremltools

    model = coremltools.convert(program.run_decompositions({}), compute_precision=coremltools.precision.FLOAT32)
    model.save(path)  # pyright: ignore[reportAttributeAccessIssue]


def run(path: str, batches: list) -> list:
    """The outputs for each batch, in the order of the network's."""
    import coremltools

    model = coremltools.models.MLModel(path)
    description = model.get_spec().description
    names, results = ([value.name for value in values] for values in (description.input, description.output))
    outputs = [model.predict(dict(zip(names, batch))) for batch in batches]
    return [[output[name] for name in results] for output in outputs]
