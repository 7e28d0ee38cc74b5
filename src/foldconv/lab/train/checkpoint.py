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
import math
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...errors import CheckpointError, FoldConvError, UnsupportedError, shown, unknown
from ...files.folders import read_content
from ...files.native import describe_layers, expand_as_described, is_described, load, load_exactly, read_description
from ...files.reading import is_folder, is_safetensors, read_safetensors
from ...files.trainers import count_tensors
from ...files.weights import Taken, take
from ...methods import Method, list_methods, method_from_json
from ...network.expand import expand
from ...network.fold import fold
from ...network.tree import evaluation, foldable_layers
from .. import zoo
from ..data import ImageData
from ..importing import names_code
from ..run import RunFolder
from .classification import task_of
from .config import PLAIN, TrainConfig

Description = dict[str, Any]
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


def chosen_method(config: TrainConfig) -> Method | None:
    """The method that a config names, None for plain.

    Raises:
        UnsupportedError: unknown, or an option that it does not take.
    """
    known = [PLAIN, *list_methods()]
    if config.method not in known:
        raise UnsupportedError(unknown("method", config.method, known))
    if "method" in config.method_args:  # would stand for the method itself, below
        raise UnsupportedError("method_args: expected options of the method, received 'method'; name it by method")
    return None if config.method == PLAIN else method_from_json({"method": config.method, **config.method_args})


def build(config: TrainConfig, data: ImageData, console: Console | None = None) -> tuple[nn.Module, Description]:
    """A run's network, expanded, and how to build it again as plain values.

    It is freshly initialized, or starts from ``config.pretrained``; `console` is told when its classifier is new.

    Raises:
        UnsupportedError: an unknown architecture or method, or an option they do not take.
        NoMatchError: the method applies to no convolution of the network.
        CheckpointError: the pretrained weights are those of another network.
    """
    method = chosen_method(config)
    task = task_of(config.task)
    options = {**task.options(config, data), **config.architecture_args}
    network = zoo.create(config.architecture, **options)
    if names_code(config.architecture) and task.name == "classification":
        _expect_logits(network, config.architecture, data)
    task.check_network(network, data, config.architecture)
    if config.pretrained:
        tensors = _pretrained_tensors(config, options, network)
        if task.name == "classification" or tensors.keys() == network.state_dict().keys():
            start_from(network, tensors, str(config.pretrained), data.num_classes, console)
        else:
            start_backbone_from(network, tensors, str(config.pretrained), console)
    if method is not None:
        images = task.training_inputs(zoo.example_images(network, data.input_shape))
        chosen: dict[str, Any] = {"include": config.include, "exclude": config.exclude, "init": config.init}
        network = expand(network, method, **chosen, example_inputs=images)
    return network, {
        "architecture": config.architecture,
        "architecture_args": _without_weights(options),
        "task": config.task,
        "image_size": config.image_size,
        "data": data.name,
        "holdout": config.holdout,
        "normalize": config.normalize,
        "split": config.split,
        "input_shape": list(data.input_shape),
        "classes": None if data.classes is None else list(data.classes),
        "preprocessing": data.preprocessing,
        "method": config.method,
        "layers": describe_layers(network),
    }


def _expect_logits(network: nn.Module, name: str, data: ImageData) -> None:
    """Refuse a network of the user's own that is not for such images and classes, before anything is written."""
    images = zoo.example_images(network, data.input_shape)
    try:
        with torch.no_grad(), evaluation(network) as running:
            logits = running(images)
    except Exception as error:  # of any code
        reason = " ".join(str(error).split())
        raise UnsupportedError(
            f"{name}: does not take images of shape {tuple(images.shape)}: {reason}; give it the options that fit the "
            "data (--architecture-args)"
        ) from error
    expected = (len(images), data.num_classes)
    received = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if received != expected:
        raise UnsupportedError(
            f"{name}: expected logits of shape {expected} for images of shape {tuple(images.shape)}, received "
            f"{received}; an argument num_classes gets the number of classes"
        )


def _pretrained_tensors(config: TrainConfig, options: Description, plain: nn.Module) -> dict[str, Any]:
    """The plain network's trained tensors: the library's own, or those of a file, folded when it is expanded."""
    if isinstance(config.pretrained, str):
        choice: dict[str, Any] = {"weights": config.pretrained_weights, "prefix": config.pretrained_prefix}
        try:
            network, _ = open_network(config.pretrained, trusted=config.architecture, **choice)
        except _NamelessError:  # others' files: how many classes they are for, only their shapes say
            path = checkpoint_file(config.pretrained)
            taken = take(read_content(path), path, **choice, network=plain)
            taken.tell()
            return taken.tensors
        return dict(fold(network, blocks=False).state_dict())
    weights: Description = {key: value for key, value in options.items() if key not in ("num_classes", "in_channels")}
    weights |= {"weights": "DEFAULT"} if config.architecture.startswith("torchvision/") else {"pretrained": True}
    try:
        network = zoo.create(config.architecture, **weights)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"pretrained: no weights of {config.architecture!r}: {error}; name a checkpoint"
        ) from None
    return dict(network.state_dict())


def start_from(
    network: nn.Module, tensors: dict[str, Any], source: str, num_classes: int, console: Console | None = None
) -> list[str]:
    """Load a plain network's trained tensors; a classifier that they lack or have for other classes stays as it is.

    Returns:
        The names of the tensors that stay freshly initialized.

    Raises:
        CheckpointError: tensors are missing, unknown or misshapen, other than a classifier's.
    """
    own = network.state_dict()
    other = [
        name
        for name, tensor in own.items()
        if name in tensors
        and tensor.shape != tensors[name].shape
        and tensor.ndim > 0
        and tensor.shape[0] == num_classes
        and tensor.shape[1:] == tensors[name].shape[1:]
    ]
    absent = [name for name in own if name not in tensors]
    last = [*own][-1].rpartition(".")[0] + "."
    if not all(name.startswith(last) and own[name].shape[:1] == (num_classes,) for name in absent):
        absent = []
    load_exactly(network, {**tensors, **{name: own[name] for name in [*other, *absent]}}, Path(source))
    if other or absent:
        are = (
            f"are for {tensors[other[0]].shape[0]} classes, the data has {num_classes}"
            if other
            else "have no classifier"
        )
        text = f"pretrained weights {are}: new {', '.join([*other, *absent])}"
        if console is not None:
            console.print(text, soft_wrap=True, highlight=False)
    return [*other, *absent]


def start_backbone_from(
    network: nn.Module, tensors: dict[str, Any], source: str, console: Console | None = None
) -> str:
    """Load a plain classifier's trained tensors into that part of a larger network that has their names.

    Returns:
        What stands before these names in the network, such as ``backbone.body.``.

    Raises:
        CheckpointError: the network has no such part.
    """
    own = network.state_dict()
    first = next((name for name in tensors if any(key.endswith(f".{name}") for key in own)), None)
    starts = {key.removesuffix(first) for key in own if key.endswith(f".{first}")} if first else set()
    for start in sorted(starts, key=len):
        part = {key: tensors.get(key.removeprefix(start)) for key in own if key.startswith(start)}
        if all(value is not None and value.shape == own[key].shape for key, value in part.items()):
            network.load_state_dict({**own, **part})
            if console is not None:
                console.print(f"{start}* starts from {source} ({len(part)} tensors)", soft_wrap=True, highlight=False)
            return start
    raise CheckpointError(
        f"{source}: expected the weights of this network, or of a classifier that is its backbone, received "
        f"{len(tensors)} tensors such as {next(iter(tensors), 'none')!r}; the network has {next(iter(own))!r}"
    )


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
    path = checkpoint_file(path)
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
            raise _NamelessError(f"{path}: does not say which network it is for; name it with --architecture")
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
    options = _without_weights(given["architecture_args"])
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


class _NamelessError(CheckpointError):
    """A file that does not say which network it is for."""


def _plain(
    description: Description, path: Path, tensors: dict[str, Any], changed: Description, check: bool = True
) -> nn.Module:
    """The plain network of a description; `changed` names the layers whose tensors are not its own."""
    name, options = description.get("architecture"), _without_weights(_mapping(description.get("architecture_args")))
    if not isinstance(name, str):
        raise _NamelessError(f"{path}: does not say which network it is for; name it with --architecture")
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


def _without_weights(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _WEIGHT_SOURCES}


def _mapping(value: Any) -> dict[str, Any]:
    """A file is not trusted to have the structure we write."""
    return dict(value) if isinstance(value, dict) else {}
