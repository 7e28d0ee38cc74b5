"""Core ML: written anywhere, run on a Mac."""

# pyright: reportMissingImports=false
from __future__ import annotations

import re
from typing import Any


def convert(program: Any, path: str) -> None:
    """Write a package, a folder, in 32 bits."""
    import coremltools

    program = program.run_decompositions({})
    for node in program.graph.nodes:  # a pool that is called without a stride, which is then its window: it wants one
        if re.search(r"\.(max|avg)_pool[123]d", str(node.target)) and len(node.args) == 2:
            node.args = (*node.args, node.args[1])
    model = coremltools.convert(program, compute_precision=coremltools.precision.FLOAT32)
    model.save(path)  # pyright: ignore[reportAttributeAccessIssue]


def run(path: str, batches: list) -> list:
    """The outputs for each batch, in the order of the network's."""
    import coremltools

    model = coremltools.models.MLModel(path)
    description = model.get_spec().description
    names, results = ([value.name for value in values] for values in (description.input, description.output))
    outputs = [model.predict(dict(zip(names, batch))) for batch in batches]
    return [[output[name] for name in results] for output in outputs]
