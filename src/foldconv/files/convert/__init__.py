"""`convert_weights`: a network's weights from one framework's checkpoint into another's.

One file per framework reads it into layers with arrays in torch's layouts and writes it back; `_match` says which layer
is which; `_layers` says how a layer becomes another. None imports a framework before it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..._arguments import expect, expect_number
from ...errors import CheckpointError, UnsupportedError, shown, unknown
from ._layers import KERNELS, Layer, Network, converted, eps_of, reordered
from ._match import match

_SUFFIXES = {
    ".keras": "keras",
    ".weights.h5": "keras",
    ".params": "gluon",
    ".safetensors": "torch",
    ".pt": "torch",
    ".pth": "torch",
    ".pth.tar": "torch",
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What went where; printable.

    Attributes:
        source, target: paths, or classes of models.
        layers: the target's layers by name, in its order, with the source's.
        notes: what a reader may want to know, such as a fold on the way.
    """

    source: str
    target: str
    layers: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        width = max(map(len, self.layers.values()), default=0)
        lines = [f"  {ours:<{width}}  →  {theirs}" for theirs, ours in self.layers.items()]
        return "\n".join([f"{self.source} → {self.target}", *lines, *self.notes])


def convert_weights(
    source: Any,
    target: Any,
    *,
    like: Any = None,
    names: Mapping[str, str] | None = None,
    source_eps: float | None = None,
    target_eps: float | None = None,
    flatten: Mapping[str, tuple[int, ...] | None] | None = None,
) -> Conversion:
    """Move weights between the frameworks' checkpoints, or models, of the same network; its function is kept.

    Convolutions (grouped, depthwise, separable, transposed), DO-Conv with D and surplus taps, linear layers and norms.
    A DO-Conv is folded for a plain target; a plain convolution becomes a DO-Conv with D = 0. A norm's scale makes up
    for another eps (Keras' default is 1e-3, torch's and Gluon's 1e-5). Layers pair by `names`; by equal names; by
    shapes and order where these leave one way. The result lists the pairs; comparing outputs is the last word.

    What weights do not hold is the target's: Keras' ``padding="same"`` with a stride pads otherwise than torch's
    ``padding=1``; activations and pooling are not looked at. Of a network that lists parallel branches of equal shapes
    in another order than the other does, and where these could as well be a chain, the pairs are wrong without notice.
    Files do not tell an ignored scale (Gluon's ``scale=False``): give the block. Of files that do not tell transposed
    convolutions from others, doconv kernels count as ordinary ones.

    Args:
        source: a file (``.safetensors``, ``.pt``, ``.pth``; ``.keras``, ``.weights.h5``; ``.params``), a torch module,
            a Keras model, or a Gluon block.
        target: a file to write, of the same suffixes; an existing one is never overwritten. Or a model to load into.
        like: for a file: a checkpoint or model of the target's framework, which gives names, shapes and what there is
            besides; the values of its own are replaced. It is not changed.
        names: ``{source layer: target layer}`` for what order and shapes leave open.
        source_eps, target_eps: of the norms, where neither model nor ``.keras`` config tells; else the framework's.
        flatten: ``{Keras dense layer: (height, width, channels)}`` of the channels_last map whose flattened form it
            reads, where no config tells; None for one that reads no flattened map.

    Returns:
        Which layer went where, and notes.

    Raises:
        CheckpointError: for a file that is unreadable, a layer without a counterpart, or with several.
        UnsupportedError: for layers that no rule converts, or where the target cannot compute the same.
        FileExistsError: when the file to write exists.
        Nothing is written, no model changed in these cases.

    Example:
        >>> import foldconv, tempfile, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        >>> rich = foldconv.expand(net, "doconv")
        >>> target = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8, eps=1e-3),
        ...                         "depthwise": nn.Conv2d(8, 8, 3, groups=8)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     foldconv.save(rich, f"{folder}/rich.safetensors")
        ...     print(foldconv.convert_weights(f"{folder}/rich.safetensors", target).layers)
        {'stem': '0', 'norm': '1', 'depthwise': '3'}
        >>> torch.allclose(target["stem"].weight, net[0].weight)
        True
    """
    for name, value in {"names": names, "flatten": flatten}.items():
        expect(name, value, (Mapping, type(None)), "a dictionary by names of layers")
    for theirs in (names or {}).values():
        expect("names", theirs, str, "a layer's name for each")
    for name, eps in {"source_eps": source_eps, "target_eps": target_eps}.items():
        if eps is not None:
            expect_number(name, eps, 0)
    to_file = isinstance(target, (str, os.PathLike))
    if to_file and os.path.lexists(target):
        raise FileExistsError(f"{target}: file exists and is not overwritten; choose another name")
    if to_file == (like is None):
        raise UnsupportedError(
            "like: expected a checkpoint or model of the target's framework for a file to write, received none"
            if to_file
            else "like: a model to load into is its own template; leave it out"
        )
    given = _network(source)
    with _template(like if to_file else target, to_file) as made:
        if to_file and _framework(target) != made.framework:
            raise UnsupportedError(
                f"{target}: a file of {_framework(target)}, but like={made.where} is of {made.framework}; give one of "
                "the file's framework"
            )
        _say_flattened(flatten or {}, given, made)
        pairs = match(given, made, names or {})
        notes: list[str] = []
        values = {}
        for ours, theirs in pairs:
            eps = (0.0, 0.0)
            if ours.kind in ("norm", "affine"):
                eps = (
                    eps_of(ours, given.framework, source_eps, "source_eps"),
                    eps_of(theirs, made.framework, target_eps, "target_eps"),
                )
            if given.framework == made.framework:  # features are in one order on both sides, whatever it is
                values[theirs.name] = converted(ours, theirs, eps, notes)
                continue
            for network, layer, other in ((given, ours, theirs), (made, theirs, ours)):
                _check_flattened(network, layer, other)
            in_order = dataclasses.replace(ours, arrays=_features(ours, ours.arrays, to_torch=True))
            values[theirs.name] = _features(theirs, converted(in_order, theirs, eps, notes), to_torch=False)
        made.write(values, str(target) if to_file else None)
    where = str(target) if to_file else made.where
    return Conversion(given.where, where, {t.name: s.name for s, t in pairs}, tuple(notes))


def _framework(path: Any) -> str:
    """By the file's name."""
    for suffix, framework in _SUFFIXES.items():
        if str(path).endswith(suffix):
            return framework
    raise CheckpointError(f"{path}: expected a name ending in {', '.join(_SUFFIXES)}")


def _network(thing: Any) -> Network:
    """Of a file or a model; its framework is imported here, where it is needed."""
    if isinstance(thing, (str, os.PathLike)):
        path, framework = str(thing), _framework(thing)
        if not os.path.isfile(path):
            raise CheckpointError(f"{path}: no such file; expected a checkpoint of {framework}")
        if framework == "torch":
            try:
                from ._torch import read_file
            except ModuleNotFoundError as error:
                raise UnsupportedError(
                    f"{path}: reading it needs {error.name}; convert where that is installed, between files"
                ) from None
        elif framework == "keras":
            from ._keras_files import read_file
        else:
            from ._gluon import read_file
        return read_file(path)
    homes = {base.__module__.partition(".")[0] for base in type(thing).__mro__}
    if "keras" in homes:
        from ._keras import read_model

        return read_model(thing)
    if "mxnet" in homes:
        from ._gluon import read_block

        return read_block(thing)
    if "torch" in homes and hasattr(thing, "state_dict"):
        from ._torch import read_module

        return read_module(thing)
    raise UnsupportedError(
        f"expected a path, a torch module, a Keras model or a Gluon block, received {type(thing).__name__}"
    )


@contextlib.contextmanager
def _template(thing: Any, to_file: bool) -> Iterator[Network]:
    """The target; a Keras model that a file is made of is saved first, so that Keras says what is in it."""
    if to_file and any(base.__module__.startswith("keras.") for base in type(thing).__mro__):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            thing.save(path)
            yield dataclasses.replace(_network(path), where=thing.name)
    else:
        yield _network(thing)


def _say_flattened(flatten: Mapping[str, tuple[int, ...] | None], source: Network, target: Network) -> None:
    """Put what the user says about flattened maps into Keras' dense layers."""
    layers = [layer for net in (source, target) if net.framework == "keras" for layer in net.layers]
    known = {layer.name: layer for layer in layers if layer.kind == "dense"}
    for name, rows in flatten.items():
        if name not in known:
            raise UnsupportedError(f"flatten: {unknown('dense layer of Keras', name, known)}")
        features = known[name].shape[1]
        whole = isinstance(rows, (tuple, list)) and all(type(size) is int and size > 0 for size in rows)
        if rows is not None and not (whole and math.prod(rows) == features):
            raise UnsupportedError(
                f"flatten: {name}: expected (height, width, channels) with a product of {features}, its inputs, "
                f"received {shown(rows)}"
            )
        for layer in layers:
            if layer.name == name and layer.kind == "dense":
                layer.rows = None if rows is None else tuple(rows)


def _check_flattened(network: Network, layer: Layer, other: Layer) -> None:
    """A dense layer of Keras whose inputs may be a flattened map, which nothing tells, is not guessed about."""
    if layer.rows != "unknown":
        return
    features = layer.shape[1]
    outputs = {known.shape[known.kind == "transposed"] for known in network.layers if known.kind in KERNELS}
    # As many as a dense layer or a convolution has outputs: its channels, pooled.
    outputs |= {known.shape[0] for known in network.layers if known.kind == "dense"}
    if features not in outputs and any(features % channels == 0 for channels in outputs):
        raise UnsupportedError(
            f"{network.where}: {layer.name} (for {other.name}): whether its {features} inputs are a flattened map is "
            f"not told; say flatten={{{layer.name!r}: (height, width, channels)}}, or None where they are not "
            f"(--flatten {layer.name}=HxWxC)"
        )


def _features(layer: Layer, arrays: dict[str, np.ndarray], to_torch: bool) -> dict[str, np.ndarray]:
    """Arrays with the features of a flattened map in torch's order, or back in the layer's."""
    if not isinstance(layer.rows, tuple):
        return arrays
    kept = {} if layer.kind != "dense" else {name: array for name, array in arrays.items() if name != "weight"}
    return {
        name: kept[name] if name in kept else reordered(array, layer.rows, to_torch) for name, array in arrays.items()
    }
