"""Files that hold a network: reading them without trusting them, and building the network they describe.

Three kinds are understood: a Lightning checkpoint of `fit` (``last.ckpt``), what `foldconv.save` writes (expanded or
folded), and other people's, as `foldconv.read_weights` reads them. The first two say how to build their network:

    architecture, architecture_args     what `foldconv.zoo.create` takes
    batchnorm_folded                    whether norms were absorbed (absent: no)
    task                                what it is for (absent: classification)
    data, input_shape                   what it was trained on: name, [channels, height, width]
    image_size                          that images were resized to, as in `TrainConfig`
    classes, preprocessing              their names; how an image file becomes an input
    holdout, split, normalize           how it was split and normalized, as in `TrainConfig`
    method                              what it was trained with, "plain" for nothing
    layers                              Lightning checkpoints only: which layers are expanded, and how
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...errors import CheckpointError, FoldConvError, UnsupportedError, shown
from ...files.folders import read_content
from ...files.native import expand_as_described, is_described, load, load_exactly, read_description
from ...files.reading import is_folder, is_safetensors, read_safetensors
from ...files.trainers import count_tensors
from ...files.weights import Taken, take
from ...methods import Method, method_from_json
from ...network.expand import expand
from ...network.fold import fold
from ...network.tree import foldable_layers
from .. import zoo
from ..data import ImageData
from ..importing import names_code
from ..run import RunFolder
from .classification import task_of

Description = dict[str, Any]
_LOG = logging.getLogger(__name__)
_WEIGHT_SOURCES = frozenset(
    [
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "weights", "weights_backbone"),
        "encoder_weights",
    ]
)
"""Options by which timm and torchvision fetch weights. A file brings its own, and must not make us read other ones:
timm unpickles what ``checkpoint_path`` names.
"""
_LARGEST = 2**26
"""Numbers in one image."""
_PREFIX = "network."  # the attribute of `Classifier` that holds the network
_AVERAGE = "average.module."  # and the average of its weights, which counts where there is one


def check_classes(content: Any, data: ImageData, path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint of a run for another number of classes.

    Raises:
        CheckpointError: with both numbers.
    """
    arguments = _mapping(_mapping(_mapping(content).get("foldconv")).get("architecture_args"))
    classes = arguments.get("num_classes", data.num_classes)
    if classes != data.num_classes:
        raise CheckpointError(
            f"{path}: made for {classes} classes; {data.name!r} has {data.num_classes}: choose the data it was made for"
        )


def open_network(
    path: str | os.PathLike[str],
    architecture: str | None = None,
    architecture_args: dict[str, Any] | None = None,
    *,
    method: str | None = None,
    method_args: dict[str, Any] | None = None,
    weights: str = "auto",
    prefix: str | None = None,
    trusted: str | None = None,
) -> tuple[nn.Module, Description]:
    """The network a file holds, expanded or folded as it was saved, in evaluation mode, and its description.

    Args:
        path: a checkpoint of any of the three kinds, or a run folder, which stands for its last.ckpt.
        architecture: the plain network's name, for files that do not say.
        architecture_args: its options.
        method: what it was expanded with, for the ``state_dict`` of an expanded network.
        method_args: the method's options.
        weights: which of other people's sets of weights, as of `foldconv.read_weights`.
        prefix: what stands before the network's names in it, as of `foldconv.read_weights`; None: what fits.
        trusted: code of the user's own (``package.module:Class``) that a file may name as its network; `architecture`
            is, too.

    Raises:
        CheckpointError: missing, truncated, hostile, without a description (and `architecture` not given), or made
            for another network; or it names code that nobody said to trust.
        UnsupportedError: an architecture or method nobody knows, or options without an architecture.
    """
    folder, path = RunFolder(path), checkpoint_file(path)
    if path == folder.checkpoint and not folder.result.exists():
        _LOG.warning("%s: this run has not ended; what follows is of its last checkpoint", folder)
    if architecture_args and not architecture:
        raise UnsupportedError(
            f"{path}: architecture_args ({', '.join(architecture_args)}) need the architecture that they are for; name "
            "it, too, or leave them out"
        )
    if method_args and not method:
        raise UnsupportedError(f"{path}: method_args ({', '.join(method_args)}) need the method that they are for")
    given = {"architecture": architecture, "architecture_args": architecture_args or {}} if architecture else {}
    own = not is_folder(path) and is_safetensors(path) and is_described(path)
    content = {} if own else read_content(path)
    described = isinstance(content, dict) and "foldconv" in content
    if (own or described) and (method or weights != "auto" or prefix is not None):
        option = "method" if method else "weights" if weights != "auto" else "prefix"
        raise UnsupportedError(f"{path}: a file of foldconv says itself what is in it; leave {option} out (--{option})")
    if own:
        header = read_description(path)
        description = _described(header.get("extra"), given, trusted, path)
        network = load(path, _plain(description, path, read_safetensors(path), header))
    elif described:
        description = _described(content["foldconv"], given, trusted, path)
        tensors = _trained(content)
        network = _plain(description, path, tensors, description)
        network = expand_as_described(network, _mapping(description.get("layers")), path)
        load_exactly(network, tensors, path)
    else:
        if not architecture:
            raise NamelessError(f"{path}: does not say which network it is for; name it with --architecture")
        rich = method_from_json({"method": method, **(method_args or {})}) if method else None
        description = given
        network = _others(content, path, given, rich, {"weights": weights, "prefix": prefix})
    return network.eval(), description


def _described(found: Any, given: Description, trusted: str | None, path: Path) -> Description:
    """What a file says, and what the caller knows better; code that a file names runs only by the caller's word.

    Raises:
        CheckpointError: naming the code.
    """
    description = _mapping(found)
    name = description.get("architecture")
    if names_code(name):
        if name not in (given.get("architecture"), trusted):
            raise CheckpointError(
                f"{path}: names {name!r} as its network, whose code would run; if you trust it, give --architecture "
                f"{name}"
            )
        if given.get("architecture") == name and not given["architecture_args"]:
            return description
    return {**description, **given}


def _others(content: Any, path: Path, given: Description, method: Method | None, choice: dict[str, Any]) -> nn.Module:
    """The network of somebody else's file, expanded where its names say so."""
    options = without_weights(given["architecture_args"])
    shapes = _on_meta(given["architecture"], options, path, count_tensors(content))
    taken = take(content, path, **choice, network=shapes)  # whether it is a checkpoint at all, and of what
    try:
        if method is None and shapes is not None:
            _expect_shapes(shapes, taken.tensors, path)
        network = _plain(given, path, {}, {}, check=False)
        if method is None:
            taken = take(content, path, **choice, network=network)
        else:
            network, taken = _expanded_as_named(network, method, content, path, choice)
        load_exactly(network, taken.tensors, path)
    except CheckpointError as error:
        if "does not fit" not in str(error):
            raise
        more = "; if it is an expanded network's, name what expanded it with --method" if method is None else ""
        raise CheckpointError(f"{error}; {taken.hint()}{more}") from None
    taken.tell()
    return network


def _expanded_as_named(
    plain: nn.Module, method: Method, content: Any, path: Path, choice: dict[str, Any]
) -> tuple[nn.Module, Taken]:
    """The network with those layers expanded of which the file has the method's tensors, and these."""
    images = zoo.example_images(plain, zoo.input_shape(plain))
    rich = expand(plain, method, example_inputs=images)
    taken = take(content, path, **choice, network=rich)
    names = [*foldable_layers(rich)]
    chosen = {name for name in names if _inside(name, rich.state_dict()) <= _inside(name, taken.tensors)}
    if not chosen and all(_inside(name, taken.tensors) == _inside(name, plain.state_dict()) for name in names):
        raise UnsupportedError(f"{path}: no layer in it is expanded with {method.name}; leave --method out")
    if chosen and len(chosen) < len(names):
        rich = expand(plain, method, where=lambda name, _: name in chosen, example_inputs=images)
        taken = take(content, path, **choice, network=rich)
    return rich, taken


def _inside(name: str, tensors: dict[str, Any]) -> set[str]:
    """The names of a layer's tensors that are more than a count of batches."""
    return {
        key for key in tensors if key.startswith(f"{name}." if name else "") and not key.endswith("num_batches_tracked")
    }


def _trained(content: dict[str, Any]) -> dict[str, Any]:
    """The network's tensors in a Lightning checkpoint: the average where there is one."""
    state = {str(key): value for key, value in _mapping(content.get("state_dict")).items()}
    average, own = (
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for prefix in (_AVERAGE, _PREFIX)
    )
    return average or own


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The file that a path means: a run folder's newest checkpoint, anything else itself."""
    path = Path(path)
    newest = RunFolder(path).checkpoint
    return newest if path.is_dir() and newest.exists() else path


class NamelessError(CheckpointError):
    """A file that does not say which network it is for."""


def _plain(
    description: Description, path: Path, tensors: dict[str, Any], changed: Description, check: bool = True
) -> nn.Module:
    """The plain network of a description; `changed` names the layers whose tensors are not its own."""
    name, options = description.get("architecture"), without_weights(_mapping(description.get("architecture_args")))
    if not isinstance(name, str):
        raise NamelessError(f"{path}: does not say which network it is for; name it with --architecture")
    shape = description.get("input_shape", [1, 1, 1])
    sizes = shape if isinstance(shape, list | tuple) and len(shape) == 3 else [0]
    if not all(type(size) is int and 0 < size < 2**16 for size in sizes) or math.prod(sizes) > _LARGEST:
        raise CheckpointError(f"{path}: input_shape: expected [channels, height, width], received {shown(shape)}")
    try:
        if check and (shapes := _on_meta(name, options, path, len(tensors), changed)) is not None:
            _expect_shapes(shapes, tensors, path, changed)
        network = zoo.create(name, **options)
    except FoldConvError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: {name!r} cannot be built with the options it gives ({reason})") from error
    if not description.get("batchnorm_folded"):
        return network
    images = zoo.example_images(network, description.get("input_shape"))
    inputs = task_of(description.get("task", "classification")).inputs(images)
    return fold(network, batchnorm=True, example_inputs=inputs, check=False)


def _on_meta(
    name: str, options: Description, path: Path, tensors: int, changed: Description | None = None
) -> nn.Module | None:
    """The network without values: what a file asks to be built may take minutes and all memory.

    None for one whose builder computes with values; building says what is wrong, if anything is.

    Raises:
        CheckpointError: it has many more parameters than the file has tensors.
    """
    limit, made = 3 * tensors + 100, itertools.count(1)

    def counted(*_: Any) -> None:
        if next(made) > limit:
            raise CheckpointError(f"{path}: does not fit {name}, which has more than {limit} parameters")

    hook = register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"):
            return expand_as_described(zoo.create(name, **options), _mapping((changed or {}).get("layers")), path)
    except CheckpointError:
        raise
    except Exception:
        return None
    finally:
        hook.remove()


def _expect_shapes(network: nn.Module, tensors: dict[str, Any], path: Path, changed: Description | None = None) -> None:
    """Refuse another network's tensors by shapes alone.

    Raises:
        CheckpointError: the network has a kernel or matrix of another shape.
    """
    changed = changed or {}
    misshapen = [
        f"{key} (expected {tuple(parameter.shape)}, received {received})"
        for key, parameter in network.named_parameters()
        if parameter.ndim > 1  # norms may be folded, and with them biases made
        if key.rpartition(".")[0] not in _mapping(changed.get("groups")) and key not in _mapping(changed.get("shared"))
        if (received := tuple(getattr(tensors.get(key), "shape", ()))) != tuple(parameter.shape)
    ]
    if misshapen:
        more = ", ..." if len(misshapen) > 5 else ""
        raise CheckpointError(
            f"{path}: does not fit {type(network).__name__}; {len(misshapen)} missing or misshapen: "
            f"{', '.join(misshapen[:5])}{more}; nothing was loaded"
        )


def without_weights(options: dict[str, Any]) -> dict[str, Any]:
    """An architecture's options but those by which weights are fetched."""
    return {key: value for key, value in options.items() if key not in _WEIGHT_SOURCES}


def _mapping(value: Any) -> dict[str, Any]:
    """A file is not trusted to have the structure we write."""
    return dict(value) if isinstance(value, dict) else {}
