"""`save` and `load`: a network's tensors in safetensors, and in its header which layers are expanded and how.

The header holds one JSON value under the key ``foldconv``:

    {"format": 1, "layers": {"layer1.0.conv1": {"method": "doconv", "depth_multiplier": 9, ...}, ...},
     "shared": {"name of a tied tensor": "name it is stored under"},
     "groups": {"layer2.0.conv2": 8, ...}, "extra": anything plain}

``groups`` lists the plain convolutions that have several, since a folded DGConv has more than the plain network's.

Nothing is pickled, so loading runs no code of the file's.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..algebra.norms import is_norm
from ..errors import CheckpointError, UnsupportedError, shown
from ..layers import NormPlace
from ..layers.permuted import PERMUTED, regrouped
from ..methods import Method, method_from_json
from ..network._subclasses import is_convolution, is_plain
from ..network.dataflow import DataFlow
from ..network.expand import expanded_layers, put_in
from ..network.tree import carry_over, copy_of, first_names, foldable_layers, replace_modules, state_of, walk
from ._described import FORMAT, check_extra, check_layers, header_of, no_larger_than
from .atomic import atomic_path
from .reading import is_safetensors, kind_of, other_than_plain, read_metadata, read_safetensors

_KEY = "foldconv"


def save(model: nn.Module, path: str | os.PathLike[str], *, extra: dict[str, Any] | None = None) -> None:
    """Write a plain, expanded or folded network to `path`.

    The training state is written as it is; saving never folds. The file appears whole or not at all: an error, a
    full disk or Ctrl-C leaves a previous file of that name as it was.

    Args:
        model: the network.
        path: the file to write, by custom ``*.safetensors``; an existing one is replaced.
        extra: plain values (what JSON can hold) to keep in the header, returned by `read_description`.

    Raises:
        UnsupportedError: for a tensor without plain values (meta, quantized, sparse, sharded), or something in `extra`
            that JSON cannot hold; nothing was written.
        OSError: when the file cannot be written.

    Example:
        >>> import foldconv, tempfile, torch
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
        >>> rich = foldconv.expand(net, "doconv")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     foldconv.save(rich, f"{folder}/rich.safetensors")
        ...     again = foldconv.load(f"{folder}/rich.safetensors", net)
        >>> torch.equal(again[0].D, rich[0].D), type(again[0]).__name__
        (True, 'DOConv2d')
    """
    from safetensors.torch import save_file

    extra = {} if extra is None else extra
    if not isinstance(extra, dict):
        raise UnsupportedError(f"extra: expected a dictionary, received {shown(extra)}")
    check_extra(extra)
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in state_of(model).items():
        if not isinstance(tensor, Tensor) or tensor.dtype in (torch.complex32, torch.complex128):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UnsupportedError(f"{name}: a file of foldconv holds tensors of real numbers, received {kind}")
        remedy = other_than_plain(tensor)
        if remedy:
            raise UnsupportedError(f"{name}: expected plain values, received {kind_of(tensor)}; {remedy}")
        # Tied tensors are stored once; safetensors refuses two names for one memory.
        where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(where, name) != name:
            shared[name] = first[where]
        else:
            tensors[name] = tensor.detach().to("cpu").contiguous()
    groups = {name: conv.groups for name, conv in walk(model) if _is_plain(conv) and conv.groups > 1}
    description = {
        "format": FORMAT,
        "layers": describe_layers(model),
        "shared": shared,
        "groups": groups,
        "order": [*tensors],  # safetensors itself keeps the alphabet's
        "extra": extra,
    }
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={_KEY: json.dumps(description)})


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """The network that `save` wrote, rebuilt around the plain network `model`.

    Args:
        path: a file of `save`.
        model: the plain network (for a fold that absorbed norms: ``fold(plain, batchnorm=True)``); left as it is.

    Returns:
        A new network: `model` with the file's layers expanded and the file's values.

    Raises:
        CheckpointError: when the file is missing, truncated, of another kind, or does not fit `model`; the message
            lists the keys.
    """
    description, tensors = read_description(path), read_safetensors(path)
    rebuilt = expand_as_described(model, description["layers"], path, tensors)
    tensors |= {name: tensors[stored] for name, stored in description["shared"].items() if stored in tensors}
    rebuilt = _regroup(rebuilt, description["groups"], tensors)
    load_exactly(rebuilt, tensors, path)
    return rebuilt


def _is_plain(module: nn.Module) -> TypeGuard[Any]:
    return is_plain(module) or type(module) in PERMUTED.values()


def _regroup(model: nn.Module, groups: dict[str, int], tensors: dict[str, Tensor]) -> nn.Module:
    """The model with as many groups as the file's convolutions have, where they can be split so."""
    replacements: dict[nn.Module, nn.Module] = {}
    for name, conv in walk(model):
        number = groups.get(name, 0)
        if type(conv) not in PERMUTED or number <= 0:
            continue
        plain: Any = conv
        divides = not (number % plain.groups or plain.in_channels % number or plain.out_channels % number)
        if number != plain.groups and divides:
            orders = {o: (f"{name}.{o}" if name else o) in tensors for o in ("input_order", "output_order")}
            replacements[conv] = carry_over(conv, regrouped(conv, number, **orders))
    return replace_modules(model, replacements)


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Each foldable layer's name with its method and options, as plain values; and the norm that it took in, if any.

    >>> import foldconv
    >>> describe_layers(foldconv.expand(nn.Sequential(nn.Conv2d(1, 1, 3)), "doconv"))
    {'0': {'method': 'doconv', 'depth_multiplier': 9, 'composition': 'kernel'}}
    """
    places = {place.link[0]: name for name, place in walk(model) if isinstance(place, NormPlace)}
    described: dict[str, dict[str, Any]] = {}
    for name, layer in foldable_layers(model).items():
        # A user's own block is part of the plain network already.
        if layer.method is not None:
            norm = {"norm": places.get(layer)} if layer.method.takes_norm else {}
            described[name] = layer.method.to_json() | norm
    return described


def expand_as_described(
    model: nn.Module, layers: dict[str, dict[str, Any]], path: Any = "", tensors: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy of the plain `model` with the layers of `describe_layers` expanded.

    Args:
        model: the plain network.
        layers: as `describe_layers` gives them, from a file that nobody has checked.
        path: the file, for messages.
        tensors: what will be loaded; layers that are far larger are not built.

    Raises:
        CheckpointError: naming the layer that `model` lacks or that cannot be expanded that way.
    """
    check_layers(layers, path, tensors)
    work = copy_of(model)
    modules = dict(walk(work))
    chosen: dict[str, tuple[nn.Module, Method]] = {}
    recorded: dict[nn.Module, Any] = {}
    for name, description in layers.items():
        conv = modules.get(name)
        if conv is None or not is_convolution(conv):
            found = "does not have" if conv is None else f"has as {type(conv).__name__}"
            raise CheckpointError(
                f"{path}: expects a convolution named {name!r}, which {type(model).__name__} {found}; pass the plain "
                "network that was expanded"
            )
        if "norm" in description:
            recorded[conv] = description["norm"]
        try:
            chosen[name] = conv, method_from_json({key: value for key, value in description.items() if key != "norm"})
        except (TypeError, ValueError) as error:  # options of any type
            raise CheckpointError(f"{path}: {name}: {error}") from None
    takes_norm = any(method.takes_norm for _, method in chosen.values())
    try:
        norms = _norms(work, recorded, path) if takes_norm else {}
        # The values come from the file: no need to start from the plain network's, which some layers could not.
        with no_larger_than(tensors, path) if tensors is not None else contextlib.nullcontext():
            return put_in(work, expanded_layers(chosen, norms, "paper"))
    except UnsupportedError as error:
        raise CheckpointError(f"{path}: {error}; is {type(model).__name__} the network that was expanded?") from None


def _norms(model: nn.Module, recorded: dict[nn.Module, Any], path: Any) -> dict[nn.Module, nn.Module]:
    """The norm that each layer takes in: as the file says, and where it says nothing (older ones), as data flow proves.

    Raises:
        CheckpointError: when the file names a norm that there is not, or another than data flow proves.
    """
    names, modules = first_names(model), dict(walk(model))
    proven, taken = DataFlow(model).pairs, set()
    norms = {conv: norm for conv, norm in proven.items() if conv not in recorded}
    for conv, name in recorded.items():
        norm = modules.get(name) if isinstance(name, str) else None
        where, channels = f"{path}: {names[conv]}", conv.out_channels
        if name is not None and (norm is None or not is_norm(norm) or norm in taken or _width(norm) != channels):
            raise CheckpointError(
                f"{where}: took in the norm {shown(name)} of {channels} channels, which {type(model).__name__} does "
                "not have for it; pass the plain network that was expanded"
            )
        if norm is None:
            continue
        if proven.get(conv, norm) is not norm:
            raise CheckpointError(
                f"{where}: took in the norm {shown(name)}, but in {type(model).__name__} {names[proven[conv]]!r} "
                "follows it; pass the plain network that was expanded"
            )
        taken.add(norm)
        norms[conv] = norm
    return norms


def _width(norm: Any) -> int:
    return getattr(norm, "num_features", None) or norm.weight.numel()


def is_described(path: str | os.PathLike[str]) -> bool:
    """Is this a file of `save`?

    Raises:
        CheckpointError: when the file is missing, or safetensors and truncated.
    """
    return is_safetensors(path) and _KEY in read_metadata(path)


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a file of `save`: ``format``, ``layers``, ``shared``, ``extra``.

    Raises:
        CheckpointError: when the file is missing, truncated or of another kind.
    """
    metadata = read_metadata(path)
    if _KEY not in metadata:
        raise CheckpointError(f"{path}: expected a file written by foldconv.save, found safetensors without its header")
    return header_of(metadata[_KEY], path)


def load_exactly(
    model: nn.Module, tensors: dict[str, Tensor], path: Any, called: Callable[[str], str] = lambda name: name
) -> None:
    """Load into `model` what fits key for key and shape for shape, or nothing at all.

    Args:
        model: the network to load into.
        tensors: the values by the model's names.
        path: the file they come from, for messages.
        called: what the file calls a name of the model, for messages.

    Raises:
        CheckpointError: listing missing, surplus and misshapen keys.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {shown(called(name))}: expected a tensor, received {kind_of(tensor)}")
        if other_than_plain(tensor):
            received = f"received {kind_of(tensor)}; {other_than_plain(tensor)}"
            raise CheckpointError(f"{path}: {shown(called(name))}: expected plain values, {received}")
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - wanted.keys())
    misshapen = [
        f"{called(name)} (expected {tuple(wanted[name].shape)}, received {tuple(tensors[name].shape)})"
        for name in sorted(wanted.keys() & tensors.keys())
        if wanted[name].shape != tensors[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(name[:160] for name in names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (
            ("missing", [*map(called, missing)]),
            ("surplus", [*map(called, surplus)]),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}; {'; '.join(problems)}; nothing was loaded")
    for name, tensor in tensors.items():
        reason = _lost(tensor, wanted[name])
        if reason:
            raise CheckpointError(f"{path}: {called(name)}: {reason}; nothing was loaded")
    model.load_state_dict(tensors)


def _lost(given: Tensor, wanted: Tensor) -> str:
    """Why values are no longer what they were in the place of `wanted`, or nothing: rounding is all that may happen."""
    if given.dtype == wanted.dtype:
        return ""
    kinds = [_kind(given.dtype), _kind(wanted.dtype)]
    counted = given.dim() == 0 and set(kinds) == {"floating point", "integer"}  # some write a count as a float
    if kinds[0] != kinds[1] and not counted:
        return f"expected {kinds[1]} values, received {kinds[0]} ones ({given.dtype})"
    cast = given.to(wanted.dtype)
    inexact = given.isfinite() & ~cast.isfinite() if kinds[1] == "floating point" else cast.to(given.dtype) != given
    return f"{int(inexact.sum()):,} of its values are beyond {wanted.dtype}" if inexact.any() else ""


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating point" if dtype.is_floating_point else "boolean" if dtype == torch.bool else "integer"
