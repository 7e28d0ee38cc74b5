"""torch's own exported program, run by torch."""

from __future__ import annotations

from typing import Any


def convert(program: Any, path: str) -> None:
    """Write one file."""
    import torch

    torch.export.save(program, path)


def run(path: str, batches: list) -> list:
    """The outputs for each batch."""
    import torch
    from torch.utils._pytree import tree_leaves

    network = torch.export.load(path).module()
    with torch.no_grad():
        outputs = [tree_leaves(network(*map(torch.from_numpy, batch))) for batch in batches]
    return [[value.numpy() for value in batch] for batch in outputs]
