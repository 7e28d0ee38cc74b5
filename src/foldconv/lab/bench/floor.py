"""The least that composing DO-Conv kernels can cost: reading and writing the weights, at the speed of a copy."""

from __future__ import annotations

from typing import Any

import torch

from ...network.tree import foldable_layers
from .contestants import Contestant
from .samples import spread


class Floor:
    """Five passes over the weights that DO-Conv expanded: read W, write K; read dK and W, write dW.

    D is small beside W (its size goes with the inputs, not with inputs times outputs) and the arithmetic is not
    counted, so no implementation that composes in memory is faster. A copy makes two passes; one is timed in every
    round, layer by layer, from a block of memory of the network's size to another.
    """

    NAME = "copy of the weights"
    PASSES = 5
    COPY = 2

    def __init__(self, weights: list[torch.Tensor]):
        self._pairs = [(torch.empty_like(w), w.detach().clone()) for w in weights]
        self.bytes = sum(w.numel() * w.element_size() for w in weights)

    @classmethod
    def of(cls, contestants: list[Contestant]) -> Floor | None:
        """That of the first contestant that composes DO-Conv kernels, if there is one."""
        for c in contestants:
            if c.method is not None and c.method.name == "doconv" and c.method.to_json()["composition"] == "kernel":
                layers: list[Any] = list(foldable_layers(c.network).values())
                return cls([layer.weight for layer in layers if layer.D is not None])
        return None

    def copy(self) -> None:
        """Copy every weight."""
        for target, source in self._pairs:
            target.copy_(source)

    def describe(self, copies: list[float], plain: list[float]) -> dict[str, Any]:
        """The floor from the seconds of the copies and of the plain network's steps in the same rounds.

        >>> floor = Floor([torch.zeros(10)]).describe([2.0, 2.0], [10.0, 20.0])
        >>> floor["bytes"], floor["bytes_per_second"], floor["seconds"], floor["ratio"]["median"]
        (40, 40.0, 5.0, 1.375)
        """
        extra = [seconds * self.PASSES / self.COPY for seconds in copies]
        return {
            "bytes": self.bytes,
            "passes": self.PASSES,
            "copy_seconds": copies,
            "bytes_per_second": self.COPY * self.bytes / spread(copies)["median"],
            "seconds": spread(extra)["median"],
            "ratio": spread([1 + e / p for e, p in zip(extra, plain, strict=True)]),
        }
