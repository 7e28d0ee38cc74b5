"""Who takes part: the plain network, twice; each method, by each path and composition."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import nn

from ... import ops
from ...errors import UnsupportedError
from ...layers import ComposedConv
from ...methods import Method, method_from_text
from ...network.expand import expand
from ...network.paths import path_of
from ...network.tree import foldable_layers
from .. import zoo
from .config import BenchConfig

PLAIN = "plain"
AGAIN = "plain again"
"""A second plain network: how far its ratio is from 1 is how much the others' can be trusted."""


@dataclasses.dataclass
class Contestant:
    """A network that takes part."""

    name: str
    network: nn.Module
    method: Method | None = None
    """Set for foldconv's own expanded networks."""
    path: str = "auto"
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    """How many layers of which class took a convolution's place."""

    def on_path(self) -> contextlib.AbstractContextManager[None]:
        """Composes by the path asked for inside the block."""
        return contextlib.nullcontext() if self.path == "auto" else ops.using(self.path)

    def describe(self) -> dict[str, Any]:
        """Layers by class, and by the path on which they are composed now."""
        if self.method is None:
            return {"layers": self.layers}
        with self.on_path():
            taken = Counter(path_of(layer).partition(":")[0] for layer in foldable_layers(self.network).values())
        return {"layers": self.layers, "paths": dict(taken)}


def build(config: BenchConfig) -> list[Contestant]:
    """Every contestant, on the config's device, with the same plain network at its root.

    Methods start as their papers do, from scratch: started from a plain network, branches hold zeros.

    Raises:
        UnsupportedError: an unknown network, method or option; no GPU.
    """
    methods = [method_from_text(text) for text in config.methods]
    plain = _plain_network(config)
    found = [Contestant(PLAIN, plain), Contestant(AGAIN, copy.deepcopy(plain))]
    for text, method in zip(config.methods, methods):
        found += _expanded(config, plain, text, method)
    if len(found) == 2:
        raise UnsupportedError(
            f"composition: none of {', '.join(config.methods)} has the choice of {', '.join(config.composition)}; "
            "add kernel"
        )
    return found


def _plain_network(config: BenchConfig) -> nn.Module:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("device: 'cuda' asked for, but torch finds no GPU; use --device cpu")
    torch.manual_seed(0)
    return zoo.create(config.network).to(config.device)


def _expanded(config: BenchConfig, plain: nn.Module, text: str, method: Method) -> list[Contestant]:
    found = []
    has_choice = any(field.name == "composition" for field in dataclasses.fields(method))
    for composition in config.composition if has_choice else ("kernel",) if "kernel" in config.composition else ():
        chosen = dataclasses.replace(method, composition=composition) if has_choice else method
        network = expand(plain, chosen, init="paper", example_inputs=zoo.example_images(plain))
        layers = foldable_layers(network).values()
        counts = Counter(type(layer).__name__ for layer in layers)
        # Only where a layer asks for a path do paths differ.
        asks = composition == "kernel" and any(_asks_for_a_path(layer) for layer in layers)
        for number, path in enumerate(config.path if asks else config.path[:1]):
            remarks = [composition] if composition != "kernel" else []
            remarks += [path] if asks and path != "auto" else []
            name = f"{text} ({', '.join(remarks)})" if remarks else text
            own = copy.deepcopy(network) if number else network
            found.append(Contestant(name, own, chosen, path if asks else "auto", dict(counts)))
    return found


def _asks_for_a_path(layer: nn.Module) -> bool:
    return isinstance(layer, ComposedConv) and layer.composition_tensors() is not None
