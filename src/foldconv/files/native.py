"""`save` and `load`: a network's tensors in safetensors, and in its header which layers are expanded and how.

The header holds one JSON value under the key ``foldconv``:

    {"format": 1, "layers": {"layer1.0.conv1": {"method": "doconv", "depth_multiplier": 9, ...}, ...},
     "shared": {"name of a tied tensor": "name it is stored under"},
     "groups": {"layer2.0.conv2": 8, ...}, "extra": anything plain}

``groups`` lists the plain convolutions that have several, since a folded DGConv has more than the plain network's.

Nothing is pickled, so loading runs no code of the file's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeGuard

from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from ..layers.permuted import PERMUTED, regrouped
from ..methods import Method, method_from_json
from ..network._subclasses import is_convolution, is_plain
from ..network.dataflow import DataFlow
from ..network.expand import expanded_layers
from ..network.tree import carry_over, copy_of, foldable_layers, replace_modules, state_of, walk
from .atomic import atomic_path
from .reading import is_safetensors, read_metadata, read_safetensors

FORMAT = 1
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

    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in state_of(model).items():
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
        "extra": extra or {},
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
    rebuilt = expand_as_described(model, description["layers"], path)
    for name, stored in description.get("shared", {}).items():
        if stored in tensors:
            tensors[name] = tensors[stored]
    rebuilt = _regroup(rebuilt, description.get("groups"), tensors)
    load_exactly(rebuilt, tensors, path)
    return rebuilt


def _is_plain(module: nn.Module) -> TypeGuard[Any]:
    return is_plain(module) or type(module) in PERMUTED.values()


def _regroup(model: nn.Module, groups: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """The model with as many groups as the file's convolutions have, where they can be split so."""
    replacements: dict[nn.Module, nn.Module] = {}
    for name, conv in walk(model):
        number = groups.get(name) if isinstance(groups, dict) else None
        if type(conv) not in PERMUTED or type(number) is not int or number <= 0:
            continue
        plain: Any = conv
        divides = not (number % plain.groups or plain.in_channels % number or plain.out_channels % number)
        if number != plain.groups and divides:
            orders = {o: (f"{name}.{o}" if name else o) in tensors for o in ("input_order", "output_order")}
            replacements[conv] = carry_over(conv, regrouped(conv, number, **orders))
    return replace_modules(model, replacements)


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Each foldable layer's name with its method and options, as plain values.

    >>> import foldconv
    >>> describe_layers(foldconv.expand(nn.Sequential(nn.Conv2d(1, 1, 3)), "doconv"))
    {'0': {'method': 'doconv', 'depth_multiplier': 9, 'composition': 'kernel'}}
    """
    layers = foldable_layers(model).items()
    # A user's own block is part of the plain network already.
    return {name: layer.method.to_json() for name, layer in layers if layer.method is not None}


def expand_as_described(model: nn.Module, layers: dict[str, dict[str, Any]], path: Any = "") -> nn.Module:
    """A copy of the plain `model` with the layers of `describe_layers` expanded.

    Raises:
        CheckpointError: naming the layer that `model` lacks or that cannot be expanded that way.
    """
    work = copy_of(model)
    modules = dict(walk(work))
    chosen: dict[str, tuple[nn.Module, Method]] = {}
    for name, description in layers.items():
        conv = modules.get(name)
        if conv is None or not is_convolution(conv):
            found = "does not have" if conv is None else f"has as {type(conv).__name__}"
            raise CheckpointError(
                f"{path}: expects a convolution named {name!r}, which {type(model).__name__} {found}; pass the plain "
                "network that was expanded"
            )
        try:
            chosen[name] = conv, method_from_json(description)
        except UnsupportedError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
    takes_norm = any(method.takes_norm for _, method in chosen.values())
    try:
        norms = DataFlow(work).pairs if takes_norm else {}
        # The values come from the file: no need to start from the plain network's, which some layers could not.
        return replace_modules(work, expanded_layers(chosen, norms, "paper"))
    except UnsupportedError as error:
        raise CheckpointError(f"{path}: {error}; is {type(model).__name__} the network that was expanded?") from None


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
    try:
        description = json.loads(metadata[_KEY])
        known = description["format"] == FORMAT and isinstance(description["layers"], dict)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise CheckpointError(
            f"{path}: its foldconv header is damaged or of a newer format than {FORMAT}; update foldconv"
        )
    return description


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
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - wanted.keys())
    misshapen = [
        f"{called(name)} (expected {tuple(wanted[name].shape)}, received {tuple(tensors[name].shape)})"
        for name in sorted(wanted.keys() & tensors.keys())
        if wanted[name].shape != tensors[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (
            ("missing", [*map(called, missing)]),
            ("surplus", [*map(called, surplus)]),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit {type(model).__name__}; {'; '.join(problems)}; nothing was loaded")
    model.load_state_dict(tensors)
