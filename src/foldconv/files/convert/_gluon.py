"""Gluon's side: ``.params`` files, anywhere; blocks, where MXNet is."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ...errors import UnsupportedError
from ._layers import Kind, Layer, Network, Values, fitted, follow_in_order
from ._params import read_params, write_params

_ROLES = {
    "weight_extra": "weight_extra",
    "weight": "weight",
    "bias": "bias",
    "D": "D",
    "gamma": "weight",
    "beta": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
_NAME = re.compile(rf"^(?:(?P<layer>.*)[._])?(?P<role>{'|'.join(_ROLES)})$")


def read_file(path: str) -> Network:
    """The layers of ``save_parameters``, ``export`` or ``collect_params().save``."""
    arrays = read_params(path)
    layers, where = _layers(path, arrays)

    def write(values: Values, out: str | None) -> None:
        assert out is not None, "a file is no model"
        write_params(out, {**arrays, **_named(values, where, arrays)})

    return Network(path, "gluon", layers, write)


def read_block(block: Any) -> Network:
    """The layers of an initialized Gluon block, under the names of ``save_parameters``."""
    parameters = block._collect_params_with_prefix()
    waiting = [name for name, p in parameters.items() if p._data is None]
    kind = type(block).__name__
    if waiting:
        raise UnsupportedError(
            f"{kind}: {waiting[0]}: it has no values yet; initialize the network and call it once before converting"
        )
    arrays = {name: p.data().asnumpy() for name, p in parameters.items()}
    blocks = dict(_walk(block, ""))
    last = {name for name, part in blocks.items() if _setting(part, "layout").endswith("C")}
    given = {name: _channels_first(array, name, last) for name, array in arrays.items()}
    layers, where = _layers(kind, given)
    for layer in layers:
        part = blocks[layer.name]
        settings = getattr(part, "_kwargs", {})
        if layer.kind == "kernel":
            layer.kind = "transposed" if getattr(part, "_op_name", "") == "Deconvolution" else "conv"
            layer.groups = settings.get("num_group")
        if layer.kind in ("norm", "affine"):
            eps = settings.get("eps", getattr(part, "_epsilon", None))
            layer.eps = None if eps is None else float(eps)
            if settings.get("fix_gamma"):  # what it holds is ignored
                del layer.arrays["weight"]

    def write(values: Values, out: str | None) -> None:
        changed = _named(values, where, given)
        for name, array in changed.items():
            prefix = name.rpartition(".")[0]
            turned = prefix in last and name.endswith("weight")
            changed[name] = np.moveaxis(array, 1, -1) if turned and array.ndim > 2 else array
        if out is not None:
            write_params(out, {**arrays, **changed})
            return
        import mxnet as mx  # pyright: ignore[reportMissingImports]

        for name, array in changed.items():
            parameters[name].set_data(mx.nd.array(array, dtype=array.dtype))

    return Network(kind, "gluon", layers, write)


def _walk(block: Any, name: str) -> Any:
    yield name, block
    for child, part in block._children.items():
        yield from _walk(part, f"{name}.{child}" if name else child)


def _setting(block: Any, name: str) -> str:
    return str(getattr(block, "_kwargs", {}).get(name) or "")


def _channels_first(array: np.ndarray, name: str, last: set[str]) -> np.ndarray:
    turned = name.rpartition(".")[0] in last and name.endswith("weight") and array.ndim > 2
    return np.moveaxis(array, -1, 1) if turned else array


def _layers(where: str, arrays: dict[str, np.ndarray]) -> tuple[list[Layer], dict[tuple[str, str], str]]:
    """The layers by the names' prefixes, and the name of each array by layer and role."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    names = {}
    for name, array in arrays.items():
        found = _NAME.match(name.removeprefix("arg:").removeprefix("aux:"))
        if not found:
            raise UnsupportedError(
                f"{where}: {name}: no rule to convert it; expected names ending in {', '.join(_ROLES)}"
            )
        layer, role = found["layer"] or "", _ROLES[found["role"]]
        grouped.setdefault(layer, {})[role] = array
        names[layer, role] = name
    layers = []
    for name, values in grouped.items():
        kind = _kind(values)
        if kind is None:
            raise UnsupportedError(f"{where}: {name}: no rule to convert a layer with {', '.join(sorted(values))}")
        layers.append(Layer(name, kind, values))
    follow_in_order(layers)
    return layers, names


def _kind(arrays: dict[str, np.ndarray]) -> Kind | None:
    if {"running_mean", "running_var"} <= arrays.keys():
        return "norm"
    if "weight" not in arrays or {"running_mean", "running_var"} & arrays.keys():
        return None
    dimensions = arrays["weight"].ndim
    if dimensions >= 3:
        return "kernel"
    return "dense" if dimensions == 2 else "affine"


def _named(values: Values, names: dict[tuple[str, str], str], old: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    changed = {}
    for layer, arrays in values.items():
        for role, array in arrays.items():
            name = names[layer, role]
            changed[name] = fitted(array, old[name], name)
    return changed
