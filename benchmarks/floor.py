"""The least that composing DO-Conv kernels can cost: reading and writing the weights, at the speed of a copy.

Five passes over the weights that DO-Conv expanded: read W, write K; read dK and W, write dW. D is small beside W (its
size goes with the inputs, not with inputs times outputs) and the arithmetic is not counted, so no implementation that
composes in memory is faster. A copy makes two passes; one is timed in every round, layer by layer, from a block of
memory of the network's size to another.
"""

import torch

from foldconv.lab.bench.contestants import PLAIN
from foldconv.lab.bench.samples import ratios, spread
from foldconv.network.tree import foldable_layers


class Floor:
    NAME = "floor of doconv: 5 passes over its weights"
    COPY = "copy of the weights"

    def __init__(self, weights):
        self._pairs = [(torch.empty_like(w), w.detach().clone()) for w in weights]
        self.bytes = sum(w.numel() * w.element_size() for w in weights)

    @classmethod
    def of(cls, contestants):
        """That of the first contestant that composes DO-Conv kernels, if there is one."""
        for c in contestants:
            if c.method is not None and c.method.name == "doconv" and c.method.to_json()["composition"] == "kernel":
                return cls([layer.weight for layer in foldable_layers(c.network).values() if layer.D is not None])
        return None

    def copy(self):
        for target, source in self._pairs:
            target.copy_(source)

    def add_to(self, result):
        """Put a contestant in the place of the copies: the plain network's step and five passes, round by round."""
        for kind in ("medians", "ratios"):
            del result[kind][self.COPY]
        seconds, copies = result["seconds"], result["seconds"].pop(self.COPY)
        seconds[self.NAME] = [plain + copy * 5 / 2 for plain, copy in zip(seconds[PLAIN], copies, strict=True)]
        result["medians"][self.NAME] = spread(seconds[self.NAME])["median"]
        result["ratios"][self.NAME] = ratios(seconds, PLAIN)[self.NAME]
        result["floor"] = {"bytes": self.bytes, "copy_seconds": copies}
