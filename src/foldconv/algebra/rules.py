"""`kernel_of`: one rule per ordinary module, from a tree of modules to the kernel it computes."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from . import norms
from .convolutions import CONVOLUTIONS, TRANSPOSED, arguments_in_use, as_tuple, exchanged, same_padding
from .kernel import Kernel
from .modules import Scale, Sum

Rule = Callable[[Any, int, int], Kernel]
_RULES: dict[type, Rule] = {}


def kernel_rule(*classes: type) -> Callable[[Rule], Rule]:
    """Register the rule ``(module, in_channels, ndim) -> Kernel`` of a module class.

    A rule holds for the class and for subclasses that keep its ``forward``; a subclass that overrides it may
    compute anything, so it needs a rule of its own.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(classes, rule))
        return rule

    return register


def kernel_of(
    module: nn.Module,
    *,
    in_channels: int | None = None,
    ndim: int | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Kernel:
    """The kernel of a module's evaluation-mode function.

    Args:
        module: a convolution, norm, pooling, padding, `Sum`, `Scale`, ``nn.Sequential`` ... or a tree of them.
        in_channels, ndim: channels and spatial dimensions of its input, where the module itself does not tell
            (an ``nn.Identity`` or a pooling alone).
        dtype: the arithmetic's; None keeps the parameters' own.

    Raises:
        UnsupportedError: when the module is not linear, or has no exact kernel; the message names it.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).eval()
        >>> kernel = kernel_of(block)
        >>> kernel.weight.shape, kernel.bias.shape
        (torch.Size([8, 3, 3, 3]), torch.Size([8]))
    """
    own = getattr(module, "to_kernel", None)
    if own is not None:
        return own(dtype)
    found = _shape(module)
    channels, rank = in_channels or found[0], ndim or found[1]
    if not channels or not rank:
        raise UnsupportedError(
            f"{type(module).__name__} alone does not tell its channels and dimensions; pass in_channels= and ndim="
        )
    # Identities and averages are made where the parameters are.
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    # Compilers cannot follow the question which device is the default.
    there = device.type == "cpu" if torch.compiler.is_compiling() else device == torch.get_default_device()
    with contextlib.nullcontext() if there else device:
        # One dtype for the whole tree: norms compute in float64 whatever their own is.
        return _walk(module, channels, rank, dtype or _dtype(module))


def _walk(module: nn.Module, channels: int, ndim: int, dtype: torch.dtype | None) -> Kernel:
    # Containers first: they hand the channels on.
    if type(module).forward is nn.Sequential.forward:
        kernel = Kernel.identity(channels, ndim, dtype or _dtype(module))
        for name, child in module.named_children():
            with _inside(name):
                kernel = kernel.then(_walk(child, kernel.out_channels, ndim, dtype))
        return kernel
    if isinstance(module, Sum):
        total: Kernel | None = None
        for name, branch in module.named_children():
            with _inside(name):
                kernel = _walk(branch, channels, ndim, dtype)
                total = kernel if total is None else total.add(kernel)
        if total is None:
            raise UnsupportedError("a Sum without branches computes nothing")
        return total
    own = getattr(module, "to_kernel", None)
    kernel = own(dtype) if own is not None else _rule_for(module)(module, channels, ndim)
    if dtype is not None:
        bias = None if kernel.bias is None else kernel.bias.to(dtype)
        kernel = kernel.replace(weight=kernel.weight.to(dtype), bias=bias)
    if kernel.in_channels != channels or kernel.ndim != ndim:
        raise UnsupportedError(
            f"{type(module).__name__} expects {kernel.in_channels} channels in {kernel.ndim}-d, "
            f"received {channels} in {ndim}-d"
        )
    return kernel


class _inside:
    """Put the name of the child in front of an `UnsupportedError` that it raises."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, UnsupportedError):
            text = str(error)
            joint = "." if getattr(error, "inside", False) else ": "
            outer = UnsupportedError(f"{self.name}{joint}{text}")
            outer.inside = True  # pyright: ignore[reportAttributeAccessIssue]
            raise outer from None


def _rule_for(module: nn.Module) -> Rule:
    for cls in type(module).__mro__:
        rule = _RULES.get(cls)
        if rule is not None and type(module).forward is cls.forward:  # pyright: ignore[reportAttributeAccessIssue]
            return rule
    if norms.is_norm(module) and isinstance(norms.after_norm(module), nn.Identity):
        return _norm
    if norms.is_statistical_norm(module):
        raise UnsupportedError(
            f"{type(module).__name__} normalizes by statistics of its own input, which no fixed kernel can do"
        )
    raise UnsupportedError(
        f"no rule gives a kernel for {type(module).__module__}.{type(module).__qualname__}; if it is linear, "
        "register one with foldconv.algebra.kernel_rule"
    )


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def _shape(module: nn.Module) -> tuple[int | None, int | None]:
    """Input channels and spatial dimensions, as far as the tree tells."""
    if isinstance(module, (Sum, nn.Sequential)):
        # The first child to know the channels is the first that can change them: the ones before pass them on.
        found = [_shape(child) for child in module.children()]
        return next((c for c, _ in found if c), None), next((n for _, n in found if n), None)
    channels = getattr(module, "in_channels", None) or getattr(module, "num_features", None)
    if isinstance(module, Scale):
        channels = module.weight.numel()
    # torch names the rank last: Conv2d, BatchNorm1d, AvgPool3d.
    names = [re.search(r"([123])d$", cls.__name__) for cls in type(module).__mro__]
    return channels, next((int(name[1]) for name in names if name), None)


# ---------------------------------------------------------------------- the rules


def conv_geometry(conv: Any) -> dict[str, Any]:
    """Stride, padding, dilation, groups and mode of an ``nn.Conv*d`` in the algebra's terms."""
    found = arguments_in_use(conv)
    padding = found["padding"]
    if isinstance(padding, str):
        found["padding"] = same_padding(conv) if padding == "same" else tuple((0, 0) for _ in found["stride"])
    else:
        found["padding"] = tuple((p, p) for p in padding)
    if not any(b or a for b, a in found["padding"]):
        found["padding_mode"] = "zeros"
    return found


@kernel_rule(*CONVOLUTIONS.values())
def _conv(module: Any, channels: int, ndim: int) -> Kernel:
    return Kernel(module.weight, module.bias, **conv_geometry(module))


def transposed_geometry(conv: Any) -> dict[str, Any]:
    """Stride, cropping, dilation and groups of an ``nn.ConvTranspose*d`` in the algebra's terms."""
    found = arguments_in_use(conv)
    del found["padding_mode"]
    padding = tuple((p, p - extra) for p, extra in zip(found["padding"], found.pop("output_padding")))
    return found | {"padding": padding, "transposed": True}


@kernel_rule(*TRANSPOSED.values())
def _conv_transpose(module: Any, channels: int, ndim: int) -> Kernel:
    return Kernel(exchanged(module.weight, module.groups), module.bias, **transposed_geometry(module))


@kernel_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _norm(module: Any, channels: int, ndim: int) -> Kernel:
    return Kernel.scaling(*norms.scale_and_shift(module), ndim)


@kernel_rule(Scale)
def _scale(module: Scale, channels: int, ndim: int) -> Kernel:
    return Kernel.scaling(module.weight, None, ndim)


@kernel_rule(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
def _identity(module: nn.Module, channels: int, ndim: int) -> Kernel:
    # Dropout is the identity in evaluation mode, the function that folding keeps.
    return Kernel.identity(channels, ndim)


@kernel_rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _average(module: Any, channels: int, ndim: int) -> Kernel:
    padding = as_tuple(module.padding, ndim)
    if module.ceil_mode:
        raise UnsupportedError(f"{type(module).__name__} with ceil_mode=True averages partial windows at the border")
    if any(padding) and not module.count_include_pad:
        raise UnsupportedError(
            f"{type(module).__name__} with padding and count_include_pad=False divides by another number at the border"
        )
    return Kernel.average(
        channels,
        as_tuple(module.kernel_size, ndim),
        getattr(module, "divisor_override", None),
        stride=as_tuple(module.stride, ndim),
        padding=tuple((p, p) for p in padding),
    )


def _padding_rule(mode: str) -> Rule:
    def rule(module: Any, channels: int, ndim: int) -> Kernel:
        flat = module.padding
        padding = tuple((flat[2 * i], flat[2 * i + 1]) for i in reversed(range(ndim)))
        return Kernel.identity(channels, ndim).replace(padding=padding, padding_mode=mode)

    return rule


for _mode, _prefix in {
    "zeros": "Zero",
    "reflect": "Reflection",
    "replicate": "Replication",
    "circular": "Circular",
}.items():
    kernel_rule(*(getattr(nn, f"{_prefix}Pad{n}d") for n in (1, 2, 3)))(_padding_rule(_mode))
