"""Files that hold a network: reading them without trusting them, and building the network they describe.

Three kinds are understood: a Lightning checkpoint of `fit` (``last.ckpt``), what `foldconv.save` writes (expanded or
folded), and a bare ``state_dict`` in a .pt, .pth or .safetensors file. The first two say how to build their network:

    architecture, architecture_args     what `foldconv.zoo.create` takes
    batchnorm_folded                    whether norms were absorbed (absent: no)
    data, input_shape                   what it was trained on: name, [channels, height, width]
    method                              what it was trained with, "plain" for nothing
    layers                              Lightning checkpoints only: which layers are expanded, and how
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from .. import zoo
from ..checkpoints import is_safetensors, read_checkpoint, read_safely
from ..errors import CheckpointError, UnsupportedError, nearest
from ..folding import fold
from ..methods import list_methods, method_from_json
from ..serialization import describe_layers, expand_as_described, load, load_exactly, read_description
from ..surgery import expand
from .config import PLAIN, TrainConfig
from .data import ImageData

Description = dict[str, Any]
_WEIGHT_SOURCES = frozenset(
    ["pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "weights", "weights_backbone"]
)
"""Options by which timm and torchvision fetch weights. A file brings its own, and must not make us read other ones:
timm unpickles what ``checkpoint_path`` names.
"""
_PREFIX = "network."  # the attribute of `Classifier` that holds the network


def build(config: TrainConfig, data: ImageData) -> tuple[nn.Module, Description]:
    """A run's network, expanded and freshly initialized, and how to build it again as plain values.

    Raises:
        UnsupportedError: an unknown architecture or method, or an option they do not take.
        NoMatchError: the method applies to no convolution of the network.
    """
    options = {"num_classes": data.num_classes, "in_channels": data.input_shape[0], **config.architecture_args}
    network = zoo.create(config.architecture, **options)
    known = [PLAIN, *list_methods()]
    if config.method not in known:
        hint = nearest(config.method, known)
        raise UnsupportedError(f"unknown method {config.method!r}{hint}; expected one of: {', '.join(known)}")
    if config.method != PLAIN:
        method = method_from_json({"method": config.method, **config.method_args})
        network = expand(network, method, init=config.init)
    return network, {
        "architecture": config.architecture,
        "architecture_args": _without_weights(options),
        "data": data.name,
        "input_shape": list(data.input_shape),
        "method": config.method,
        "layers": describe_layers(network),
    }


def open_network(
    path: str | os.PathLike[str],
    architecture: str | None = None,
    architecture_args: dict[str, Any] | None = None,
) -> tuple[nn.Module, Description]:
    """The network a file holds, expanded or folded as it was saved, in evaluation mode, and its description.

    Args:
        path: a checkpoint of any of the three kinds.
        architecture: the plain network's name, for files that do not say.
        architecture_args: its options.

    Raises:
        CheckpointError: missing, truncated, hostile, without a description (and `architecture` not given), or made
            for another network.
        UnsupportedError: an architecture or method nobody knows.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint file, received a folder; a run's is last.ckpt in it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    given = {"architecture": architecture, "architecture_args": architecture_args or {}} if architecture else {}
    if is_safetensors(path) and not (given and not _has_header(path)):
        description = {**_mapping(read_description(path).get("extra")), **given}
        network = load(path, _plain(description, path))
    else:
        content = {} if is_safetensors(path) else read_safely(path)
        described = isinstance(content, dict) and "foldconv" in content
        description = {**_mapping(content["foldconv"] if described else {}), **given}
        network = _plain(description, path)
        if described:
            network = expand_as_described(network, _mapping(description.get("layers")), path)
            state = _mapping(content.get("state_dict")).items()
            tensors = {key.removeprefix(_PREFIX): value for key, value in state if key.startswith(_PREFIX)}
        else:
            tensors = read_checkpoint(path)
        load_exactly(network, tensors, path)
    return network.eval(), description


def _plain(description: Description, path: Path) -> nn.Module:
    name, options = description.get("architecture"), _without_weights(_mapping(description.get("architecture_args")))
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: does not say which network it is for; name it with --architecture")
    network = zoo.create(name, **options)
    return fold(network, batchnorm=True, check=False) if description.get("batchnorm_folded") else network


def _without_weights(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _WEIGHT_SOURCES}


def _mapping(value: Any) -> dict[str, Any]:
    """A file is not trusted to have the structure we write."""
    return dict(value) if isinstance(value, dict) else {}


def _has_header(path: Path) -> bool:
    try:
        read_description(path)
    except CheckpointError:
        return False
    return True
