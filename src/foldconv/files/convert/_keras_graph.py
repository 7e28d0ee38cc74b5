"""What a Sequential or functional Keras config tells besides the layers: what feeds what, and flattened maps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError, shown

_MODELS = ("Sequential", "Functional", "Model")
# Between a Flatten and what reads it: these keep order and number of the features.
_KEEP = {"Dropout", "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "GaussianNoise", "GaussianDropout"}
_KEEP |= {"AlphaDropout", "BatchNormalization", "Identity", "ActivityRegularization", "Rescaling"}
_POOLED = {f"Global{kind}Pooling{rank}" for kind in ("Average", "Max") for rank in ("1D", "2D", "3D")}
_VECTOR = {*_POOLED, "Dense", "InputLayer"}


class Graph:
    """The layers of a config, nested models included, by name.

    Attributes:
        layers: ``(path in the weights file, name, description)`` in the order of the network, without the models.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[str, str, dict[str, Any]]] = []
        self.sources: dict[str, list[str]] = {}
        self.readers: dict[str, list[str]] = {}
        self.described: dict[str, dict[str, Any]] = {}

    @staticmethod
    def of(config: dict[str, Any]) -> Graph | None:
        """Of a model's config; None for a model of another kind, whose config says nothing of its inside."""
        if not _is_model(config):
            return None
        graph = Graph()
        graph._add(config, "layers", "", None)
        for name, sources in graph.sources.items():
            for source in sources:
                graph.readers.setdefault(source, []).append(name)
        return graph

    def _add(self, model: dict[str, Any], path: str, prefix: str, before: str | None) -> str | None:
        """Add a model's layers, under names that start with `prefix`; the name of the last."""
        counts: dict[str, int] = {}
        inside: dict[str, str | None] = {}  # a nested model's last layer
        sequential = model["class_name"] == "Sequential"
        previous = before
        for described in model["config"]["layers"]:
            cls, name = described["class_name"], prefix + described["config"].get("name", described.get("name"))
            if sequential and cls == "InputLayer":
                continue
            key = snake_case(cls)
            number = counts[key] = counts.get(key, -1) + 1
            where = f"{path}/{key}_{number}" if number else f"{path}/{key}"
            given = [previous] if sequential else [prefix + source for source in _inputs(described)]
            sources = [found for source in given if source and (found := inside.get(source, source))]
            if cls == "InputLayer" and before is not None:
                sources = [before]
            if _is_model(described):
                only = sources[0] if len(sources) == 1 else None
                inside[name] = previous = self._add(described, f"{where}/layers", f"{name}/", only)
                continue
            self.layers.append((where, name, described))
            self.described[name] = described
            self.sources[name] = sources
            previous = name
        if sequential:
            return previous
        outputs = model["config"].get("output_layers") or []
        last = outputs[0] if outputs and isinstance(outputs[0], str) else outputs[0][0] if outputs else None
        return inside.get(prefix + last, prefix + last) if last else previous

    def norm_after(self, name: str) -> str | None:
        """The norm that alone reads a layer's output."""
        readers = self.readers.get(name, [])
        if len(readers) == 1 and self.described[readers[0]]["class_name"] == "BatchNormalization":
            return readers[0]
        return None

    def rows(self, name: str) -> Any:
        """The shape ``(*spatial, channels)`` of the map whose flattened form a layer reads, None where it reads none.

        ``"unknown"`` where layers are between that may order the features anew.
        """
        formats = {d["config"].get("data_format") for d in self.described.values()} - {None}
        for source in self._upstream(name):
            described = self.described[source]
            cls = described["class_name"]
            if cls in _VECTOR:
                return None
            if cls == "Flatten":
                shape = (described.get("build_config") or {}).get("input_shape") or ()
                if not all(size is None or type(size) is int for size in shape):
                    raise CheckpointError(f"{source}: expected an input shape of integers, received {shown(shape)}")
                if len(shape) <= 2 and shape:
                    return None
                if not shape or None in shape[1:] or len(formats) > 1:
                    return "unknown"
                first = described["config"].get("data_format") == "channels_first"
                return (*shape[2:], shape[1]) if first else tuple(shape[1:])
            if cls not in _KEEP:
                return None if self._is_map(cls) else "unknown"
        return None

    def _is_map(self, cls: str) -> bool:
        """Whether a layer gives maps, of which a layer takes the channels as they are."""
        return any(part in cls for part in ("Conv", "Pooling", "Padding", "Cropping"))

    def _upstream(self, name: str) -> Iterator[str]:
        """What a layer reads, and what that reads, as long as there is one of it."""
        sources, seen = self.sources.get(name, []), {name}
        while len(sources) == 1 and sources[0] in self.described and sources[0] not in seen:
            seen.add(sources[0])
            yield sources[0]
            sources = self.sources.get(sources[0], [])


def _is_model(described: dict[str, Any]) -> bool:
    config = described.get("config")
    return (
        described.get("class_name") in _MODELS and isinstance(config, dict) and isinstance(config.get("layers"), list)
    )


def _inputs(described: dict[str, Any]) -> list[str]:
    """The names of the layers whose outputs a node takes; of a layer used several times, of all its uses."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            history = value.get("config", {}).get("keras_history") if isinstance(value.get("config"), dict) else None
            if value.get("class_name") == "__keras_tensor__" and history:
                found.append(history[0])
            else:
                for inner in value.values():
                    walk(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)

    walk(described.get("inbound_nodes", []))
    return found


def snake_case(name: str) -> str:
    """As Keras makes a class's name a key of its weights files.

    >>> snake_case("DepthwiseConv2D"), snake_case("BatchNormalization"), snake_case("DOConv2D")
    ('depthwise_conv2d', 'batch_normalization', 'do_conv2d')
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
