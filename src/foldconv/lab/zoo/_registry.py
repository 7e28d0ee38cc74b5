"""Names of architectures and where they come from: this zoo, timm, torchvision, in this order, or the user's code."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import FoldConvError, UnsupportedError, option_names, refused_option, shown, unknown
from ..importing import imported, names_code, working_directory_found
from ._others import sized_detector, smp_kind, smp_network

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def register(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: make a function that builds a network known under its own name."""
    _BUILDERS[builder.__name__] = builder
    return builder


def list_architectures() -> list[str]:
    """The zoo's own names (timm and torchvision list theirs).

    >>> "digits_resnet" in list_architectures()
    True
    """
    return sorted(_BUILDERS)


def create(name: str, *, num_classes: int | None = None, in_channels: int | None = None, **kwargs: Any) -> nn.Module:
    """Build a network by name.

    Args:
        name: a name of this zoo, of timm or of torchvision; ``"timm/resnet18"`` and ``"torchvision/resnet18"`` say
            which library where both know a name (otherwise timm's is taken). ``"smp/unet"`` is a network of
            segmentation_models_pytorch, if that is installed. ``"package.module:Name"`` is a class or function of the
            user's own, found from the working directory, too, that returns a module; its code runs.
        num_classes: outputs of the classifier; None leaves the architecture's own default.
        in_channels: channels of the images; None leaves the architecture's own default. Code of the user's own gets
            each of the two if it has an argument of that name.
        kwargs: passed on to the architecture, for example ``pretrained=True`` (timm) or ``weights=...`` (torchvision).

    Raises:
        UnsupportedError: no such name (the nearest is given), or an option that the architecture does not take.

    >>> create("digits_resnet", width=8).head
    Linear(in_features=32, out_features=10, bias=True)
    """
    builder, channels, known = _find(name)
    if names_code(name):
        return _create_own(name, builder, {"num_classes": num_classes, "in_channels": in_channels}, kwargs)
    options = dict(kwargs)
    if num_classes is not None:
        options["num_classes"] = num_classes
    if channels and in_channels is not None:
        options[channels] = in_channels
    elif in_channels not in (None, 3):
        raise UnsupportedError(
            f"{name!r} is a torchvision network and takes images of 3 channels, received {in_channels}; choose a "
            "network of timm or of the zoo, which take any number"
        )
    return _build(builder, name, options, known)


def _create_own(
    name: str, builder: Callable[..., nn.Module], found: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    """A network of the user's own: of what the data say, its builder gets what it has arguments for."""
    takes = inspect.signature(builder).parameters
    options = {key: value for key, value in found.items() if value is not None and key in takes} | given
    unknown_ones = [key for key in given if key not in takes]
    if unknown_ones and not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        raise UnsupportedError(f"architecture {name!r}: {unknown('option', unknown_ones[0], [*takes])}")
    with working_directory_found():
        network = builder(**options)
    if not isinstance(network, nn.Module):
        raise UnsupportedError(f"{name}: expected a torch.nn.Module from it, received {type(network).__name__}")
    return network


def check_name(name: str) -> None:
    """Refuse a name that `create` does not know.

    Raises:
        UnsupportedError: with the nearest name.

    >>> check_name("digits_resnt")
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: unknown architecture 'digits_resnt'; did you mean 'digits_resnet'?; ...
    """
    _find(name)


def _find(name: str) -> tuple[Callable[..., nn.Module], str | None, list[Callable[..., Any]]]:
    """What builds a network, what it calls the channels of images, and the functions whose arguments are options."""
    if names_code(name):
        found: Any = imported(name, "class or function")
        if not callable(found):
            raise UnsupportedError(f"{name}: expected a class or a function, received a {type(found).__name__}")
        builder: Callable[..., Any] = found
        return builder, None, [builder]
    library, _, short = name.rpartition("/")
    if library == "" and short in _BUILDERS:
        return _BUILDERS[short], "in_channels", [_BUILDERS[short]]
    # The libraries take seconds to import: only once the name is none of ours.
    if library in ("", "timm"):
        import timm

        if timm.is_model(short):
            known = [timm.create_model, timm.models.model_entrypoint(short)]
            return functools.partial(timm.create_model, short), "in_chans", known
    if library in ("", "torchvision"):
        import torchvision

        if short in torchvision.models.list_models():
            builder = torchvision.models.get_model_builder(short)
            fetches = "weights_backbone" in inspect.signature(builder).parameters  # unless it is told not to
            build = functools.partial(builder, weights_backbone=None) if fetches else builder
            if short in torchvision.models.list_models(torchvision.models.detection):
                return functools.partial(sized_detector, build), None, [builder, sized_detector]
            return build, None, [builder]
    if library == "smp":
        kind = smp_kind(short)
        return functools.partial(smp_network, kind), "in_channels", [kind]
    raise UnsupportedError(
        f"{unknown('architecture', name, _names())} (in the zoo, timm and torchvision), or package.module:Class"
    )


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images a network was made for; (3, 224, 224) where it does not say.

    Read from timm's convention, the attribute ``default_cfg["input_size"]``; the channels from the first convolution.

    >>> input_shape(create("digits_resnet"))
    (1, 8, 8)
    """
    config = getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return (first.in_channels if first is not None else channels), height, width


def example_images(model: nn.Module, shape: Sequence[int] | None = None, count: int = 2) -> torch.Tensor:
    """Always the same random images, as a network takes them; in training mode norms need two.

    >>> example_images(create("digits_resnet")).shape
    torch.Size([2, 1, 8, 8])
    """
    first = next(model.parameters(), torch.empty(0))
    images = torch.randn(count, *(shape or input_shape(model)), generator=torch.Generator().manual_seed(0))
    return images.to(first.device, first.dtype)


def _build(
    builder: Callable[..., nn.Module], name: str, options: dict[str, Any], known: list[Callable[..., Any]]
) -> nn.Module:
    """Call the builder; `known` are the functions whose arguments are options."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # an error here
            network = builder(**options)
        empty = next((key for key, value in network.named_parameters() if 0 in value.shape), None)
        if empty is not None:
            raise ValueError(f"nothing is left of {empty}")
        return network
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        if isinstance(error, FoldConvError) or not options:
            raise
        option = refused_option(error)
        if option in options:
            where = [*known]
            # The libraries' builders pass on what they do not know: the class that refused it is in their module.
            module, refused_by = sys.modules[where[-1].__module__], str(error).partition(".")[0]
            where += [kind] if isinstance(kind := getattr(module, refused_by, None), type) else []
            message = unknown("option", option, option_names(*where))
            raise UnsupportedError(f"architecture {name!r}: {message}") from error
        reason = str(error) or type(error).__name__
        raise UnsupportedError(f"{name!r} does not take these options, received {shown(options)}: {reason}") from error


def _names() -> list[str]:
    import timm
    import torchvision

    return [*list_architectures(), *timm.list_models(), *torchvision.models.list_models()]
