"""Keras' side: ``.keras`` and ``.weights.h5`` files, read with h5py alone, and models, where Keras is.

Layouts: convolutions ``(*k, in/g, out)``, transposed ones ``(*k, out, in)``, depthwise ones ``(*k, C, m)``, dense
layers ``(in, out)``, surplus taps ``(S - k, in/g, out)`` or ``(S - k, C, m)``; D is as in torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ...errors import CheckpointError, UnsupportedError, shown
from ._keras_graph import Graph
from ._layers import Layer, Network, Values, fitted, follow_in_order

RANKS = ("1D", "2D", "3D")
CONVS = {f"{rich}Conv{rank}" for rank in RANKS for rich in ("", "DO")}
TRANSPOSED = {f"Conv{rank}Transpose" for rank in RANKS}
DEPTHWISE = {f"{rich}DepthwiseConv{rank}" for rank in RANKS for rich in ("", "DO")}
SEPARABLE = {f"SeparableConv{rank}" for rank in RANKS}
AFFINE = {"LayerNormalization", "GroupNormalization"}
KNOWN = {*CONVS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE, *AFFINE, "Dense", "BatchNormalization"}
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_BACK = {ours: theirs for theirs, ours in _NORM.items()}


@dataclasses.dataclass
class Slot:
    """A Keras layer with weights.

    Attributes:
        name: unique; the layer's own where that is so.
        cls: the class's name.
        config: its arguments, where they are known.
        variables: in Keras' order, under Keras' names where these are known, else under their numbers.
        assign: puts a value into a variable, by the same name, or writes it to the file that is being made.
    """

    name: str
    cls: str
    config: dict[str, Any] | None
    variables: dict[str, np.ndarray]
    assign: Callable[[str, np.ndarray], None] | None = None
    track: str = ""


def network(where: str, slots: list[Slot], graph: Graph | None, write: Callable[[Any, str | None], None]) -> Network:
    """The network of Keras' layers.

    Args:
        where: for messages.
        slots: the layers.
        graph: of a Sequential or functional model, else None.
        write: gets ``{slot name: {variable: array}}`` in Keras' layouts, and the path or None.
    """
    layers, parts = [], {}
    for slot in slots:
        _check_config(where, slot)
        named = _named(where, slot)
        _check_ranks(where, slot, named)
        for layer in _layers(slot, named):
            _complete(layer, slot, graph)
            layers.append(layer)
            parts[layer.name] = slot, named
    if graph is not None:
        for layer in layers:
            layer.norm = graph.norm_after(parts[layer.name][0].name)
            if layer.name.endswith("/depthwise") and parts[layer.name][0].cls in SEPARABLE:
                layer.norm = None
    elif not any(layer.track for layer in layers):
        follow_in_order(layers)

    def put(values: Values, out: str | None) -> None:
        changed: dict[str, dict[str, np.ndarray]] = {}
        for name, arrays in values.items():
            slot, named = parts[name]
            for role, array in arrays.items():
                variable, form = _target_variable(slot, name, role)
                key, old = named[variable]
                changed.setdefault(slot.name, {})[key] = fitted(form(array, old.shape), old, f"{name}: {variable}")
        write(changed, out)

    return Network(where, "keras", layers, put)


def _named(where: str, slot: Slot) -> dict[str, tuple[str, np.ndarray]]:
    """Keras' name of each variable, with the key it has in the slot and its value."""
    keys = list(slot.variables)
    names = _names(where, slot) if keys[0].isdigit() else keys
    known = {"kernel", "bias", "D", "kernel_extra", "depthwise_kernel", "pointwise_kernel", *_NORM}
    odd = [name for name in names if name not in known]
    if odd or len(names) != len(keys):
        raise UnsupportedError(
            f"{where}: {slot.name}: no rule to convert {slot.cls} with {len(keys)} variables"
            f"{' (' + ', '.join(odd) + ')' if odd else ''}; expected convolutions, doconv, dense layers and norms"
        )
    return {name: (key, slot.variables[key]) for name, key in zip(names, keys)}


def _check_config(where: str, slot: Slot) -> None:
    """What is computed with is what it should be."""
    wanted: dict[str, Any] = {"groups": int, "epsilon": (int, float), "scale": bool, "center": bool}
    for name, kind in wanted.items():
        value = (slot.config or {}).get(name)
        right = value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))
        if not right or (name in ("groups", "epsilon") and value is not None and not 0 < value < 1 << 31):
            raise CheckpointError(
                f"{where}: {slot.name}: {name}: expected what {slot.cls} takes, received {shown(value)}"
            )


def _check_ranks(where: str, slot: Slot, named: dict[str, tuple[str, np.ndarray]]) -> None:
    rank = next((int(name[0]) for name in RANKS if name in slot.cls), 0)
    for name, (_, value) in named.items():
        expected = {"D": 3, "kernel_extra": 3}.get(name, rank + 2 if "kernel" in name else 1)
        if value.ndim != expected or 0 in value.shape:
            raise CheckpointError(
                f"{where}: {slot.name}: {name}: expected {expected} dimensions of one or more, received {value.shape}"
            )


def _names(where: str, slot: Slot) -> list[str]:
    """The names of numbered variables, from the arguments where they are known."""
    count, config = len(slot.variables), slot.config
    if slot.cls in {"BatchNormalization", *AFFINE}:
        own = ["moving_mean", "moving_variance"] if slot.cls == "BatchNormalization" else []
        if config is not None:
            return [n for n, key in (("gamma", "scale"), ("beta", "center")) if config.get(key, True)] + own
        if count == len(own) + 1:
            raise UnsupportedError(
                f"{where}: {slot.name}: has a scale or a shift, not both, and the file does not tell which; "
                "give the model or its .keras file"
            )
        return (["gamma", "beta"] if count > len(own) else []) + own
    if slot.cls in SEPARABLE:
        return ["depthwise_kernel", "pointwise_kernel", "bias"][:count]
    names = ["kernel"]
    for key in list(slot.variables)[1:]:
        if key.isdigit() and slot.variables[key].ndim == 1:
            names.append("bias")
        else:
            names.append(key if not key.isdigit() else "kernel_extra" if "D" in names else "D")
    return names


def _layers(slot: Slot, named: dict[str, tuple[str, np.ndarray]]) -> list[Layer]:
    values = {name: value for name, (_, value) in named.items()}
    if slot.cls in {"BatchNormalization", *AFFINE}:
        kind = "norm" if slot.cls == "BatchNormalization" else "affine"
        return [Layer(slot.name, kind, {_NORM[name]: value for name, value in values.items()})]
    if slot.cls in SEPARABLE:
        depthwise = _from_depthwise(values["depthwise_kernel"])
        last = {"weight": _from_kernel(values["pointwise_kernel"])}
        last |= {"bias": values["bias"]} if "bias" in values else {}
        first = Layer(f"{slot.name}/depthwise", "conv", {"weight": depthwise}, groups=_channels(slot, values))
        return [first, Layer(f"{slot.name}/pointwise", "conv", last, groups=1)]
    kernel = values.pop("kernel")
    if slot.cls == "Dense":
        return [Layer(slot.name, "dense", {"weight": kernel.T, **values})]
    if slot.cls in TRANSPOSED:
        return [Layer(slot.name, "transposed", {"weight": _from_kernel(kernel), **values})]
    turned = _from_depthwise if slot.cls in DEPTHWISE else _from_kernel
    extra = values.pop("kernel_extra", None)
    arrays = {"weight": turned(kernel), **values}
    if extra is not None:
        arrays["weight_extra"] = turned(extra)
    groups = kernel.shape[-2] if slot.cls in DEPTHWISE else (slot.config or {}).get("groups")
    return [Layer(slot.name, "conv", arrays, groups=groups)]


def _channels(slot: Slot, values: dict[str, np.ndarray]) -> int:
    return values["depthwise_kernel"].shape[-2]


def _complete(layer: Layer, slot: Slot, graph: Graph | None) -> None:
    layer.track = slot.track
    if layer.kind in ("norm", "affine") and slot.config is not None:
        layer.eps = slot.config.get("epsilon")
    layer.rows = "unknown"
    if graph is not None and layer.kind in ("dense", "norm", "affine"):
        layer.rows = graph.rows(slot.name)
    features = next(iter(layer.arrays.values())).shape[-1]
    if isinstance(layer.rows, tuple) and math.prod(layer.rows) != features:
        raise CheckpointError(f"{layer.name}: expected {features} features, its config flattens {shown(layer.rows)}")
    if layer.kind != "dense" and layer.rows == "unknown":
        layer.rows = None  # norms of flattened maps are rare, those of maps are not


def _from_kernel(kernel: np.ndarray) -> np.ndarray:
    """``(*k, a, b)`` to ``(b, a, *k)``."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _from_depthwise(kernel: np.ndarray) -> np.ndarray:
    """``(*k, C, m)`` to ``(C·m, 1, *k)``."""
    turned = np.moveaxis(kernel, (-2, -1), (0, 1))
    return turned.reshape(-1, 1, *turned.shape[2:])


def _to_kernel(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(array, (0, 1), (-1, -2))


def _to_depthwise(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    split = array.reshape(shape[-2], shape[-1], *array.shape[2:])
    return np.moveaxis(split, (0, 1), (-2, -1))


def _as_is(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array


def _target_variable(slot: Slot, name: str, role: str) -> tuple[str, Callable[..., np.ndarray]]:
    """Keras' variable for an array of a layer, and how it gets Keras' layout."""
    if slot.cls in {"BatchNormalization", *AFFINE}:
        return _BACK[role], _as_is
    if role in ("bias", "D"):
        return role, _as_is
    if slot.cls in SEPARABLE:
        depthwise = name.endswith("/depthwise")
        return ("depthwise_kernel", _to_depthwise) if depthwise else ("pointwise_kernel", _to_kernel)
    variable = "kernel" if role == "weight" else "kernel_extra"
    if slot.cls == "Dense":
        return variable, lambda array, shape: array.T
    return variable, _to_depthwise if slot.cls in DEPTHWISE else _to_kernel


def read_model(model: Any) -> Network:
    """The layers of a built Keras model, whatever its kind; those of nested models as ``model/layer``."""
    slots, variables = [], {}
    for name, layer in _walk(model, ""):
        plain = _plain_class(layer)
        cls = plain.__name__
        values = {v.name: _numpy(v) for v in layer.weights}
        if cls not in KNOWN or len(values) != len(layer.weights):
            raise UnsupportedError(
                f"{model.name}: {name}: no rule to convert {cls}; expected convolutions, doconv, dense layers and "
                "norms; fold the layers of other methods first"
            )
        if name in variables:
            raise UnsupportedError(f"{model.name}: two layers are called {name}; give each its own name")
        slots.append(Slot(name, cls, plain.get_config(layer), values))
        variables[name] = {v.name: v for v in layer.weights}
    if not slots:
        raise UnsupportedError(f"{model.name}: it has no weights yet; call it, or build it, before converting")

    def write(changed: dict[str, dict[str, np.ndarray]], out: str | None) -> None:
        assert out is None, "a model as a template is saved first"
        for name, values in changed.items():
            for variable, value in values.items():
                variables[name][variable].assign(value)

    try:
        graph = Graph.of(json.loads(model.to_json()))
    except (NotImplementedError, ValueError, TypeError):
        graph = None  # a subclassed model says nothing of how its layers are connected
    return network(model.name, slots, graph, write)


def _walk(layer: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The layers with weights that are not made of others, by name."""
    for part in getattr(layer, "layers", None) or layer._flatten_layers(include_self=False, recursive=False):
        name = prefix + part.name
        inner = _plain_class(part).__name__ not in KNOWN and [
            *part._flatten_layers(include_self=False, recursive=False)
        ]
        if inner:
            yield from _walk(part, f"{name}/")
        elif part.weights:
            yield name, part


def _plain_class(layer: Any) -> Any:
    """The known class of a layer; of a subclass, too, that has only a constructor and ``get_config`` of its own."""
    for cls in type(layer).__mro__:
        if cls.__name__ in KNOWN:
            return cls
        if any(callable(value) and name not in ("__init__", "get_config") for name, value in vars(cls).items()):
            break
    return type(layer)


def _numpy(variable: Any) -> np.ndarray:
    import keras  # pyright: ignore[reportMissingImports]

    array = keras.ops.convert_to_numpy(variable)  # pyright: ignore[reportAttributeAccessIssue]
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
