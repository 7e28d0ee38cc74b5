"""A run's network: built, freshly initialized or from trained weights, and expanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ...errors import CheckpointError, UnsupportedError, unknown
from ...files.folders import read_content
from ...files.native import describe_layers, load_exactly
from ...files.weights import take
from ...methods import Method, list_methods, method_from_json
from ...network.expand import expand
from ...network.fold import fold
from ...network.tree import evaluation
from .. import zoo
from ..data import ImageData
from ..importing import names_code
from .checkpoint import Description, NamelessError, checkpoint_file, open_network, without_weights
from .classification import task_of
from .config import PLAIN, TrainConfig


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
        "architecture_args": without_weights(options),
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
        except NamelessError:  # others' files: how many classes they are for, only their shapes say
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
