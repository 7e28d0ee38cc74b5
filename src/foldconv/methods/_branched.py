"""`BranchedMethod`: what statistical methods have in common, and what their branches are built of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from ..algebra import Sum
from ..algebra.convolutions import CONVOLUTIONS, PickingConv2d
from ..algebra.norms import is_norm, norm_only
from ..algebra.rules import conv_geometry
from ..errors import UnsupportedError, shown
from ..layers import BranchedConv
from ..layers.foldable import conv_arguments
from ._moments import MomentSum
from ._registry import Init, Method

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_PADS = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


@dataclasses.dataclass(frozen=True)
class BranchedMethod(Method):
    """Base of methods that run branches with norms while training.

    The main branch is the convolution itself, with the norm that followed it if there was one. The others are new.
    With ``init="preserve"`` the last norm of each starts with zero weight: it adds nothing, and learns at once.
    """

    takes_norm: ClassVar[bool] = True
    kind: ClassVar[Literal["composable", "statistical"]] = "statistical"

    def __post_init__(self) -> None:
        moments = getattr(self, "moments", False)
        if not isinstance(moments, bool):
            raise UnsupportedError(f"moments: expected True or False, received {shown(moments)}")

    def branches(self, conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
        """The branches beside the main one, by name, built to stand beside `conv`."""
        raise NotImplementedError

    def body(self, main: nn.Sequential, conv: Any, norm: nn.Module | None) -> nn.Module:
        """The whole tree; by default the sum of the main branch and the others, a `MomentSum` if the method says so."""
        cls = MomentSum if getattr(self, "moments", False) else Sum
        return cls(main=main, **self.branches(conv, norm))

    def main_conv(self, conv: Any) -> Any:
        """The convolution of the main branch, with `conv`'s parameters.

        A convolution of its own: hooks on the old one move to the layer and must not fire twice.
        """
        own = type(conv)(**conv_arguments(conv), device="meta")
        own.weight, own.bias = conv.weight, conv.bias
        return own.train(conv.training)

    def silence(self, layer: BranchedConv) -> None:
        """Change the new branches so that they add nothing and the layer computes what `main` does.

        Whatever was learned: it is asked again when a plain checkpoint has been loaded into `main`.
        """
        for name, branch in layer.body.named_children():
            if name != "main":
                *_, last = (module for module in branch.modules() if is_norm(module))
                nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]
                nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]

    def reason_against(self, conv: Any, norm: nn.Module | None = None) -> str | None:
        """A shift needs a place after folding, and a norm running statistics."""
        if conv.transposed:
            return "branches stand beside plain convolutions only, and it is transposed"
        if norm is None and conv.bias is None:
            return "neither a norm that follows it alone nor a bias is there to take the branches' shift"
        if norm is not None and getattr(norm, "running_var", None) is None:
            return "the norm that follows it keeps no running statistics, so it could not be folded"
        return None

    def expand(self, conv: Any, init: Init = "preserve", norm: nn.Module | None = None) -> BranchedConv:
        """The branches around `conv`'s own parameters and those of the `norm` that follows it."""
        own = self.main_conv(conv)
        main = nn.Sequential()
        main.add_module("conv", own)
        own_norm: Any = None if norm is None else norm_only(norm)
        if own_norm is not None:
            main.add_module("norm", own_norm)
        layer = BranchedConv(self.body(main, own, norm), own, self, own_norm)
        old = set(main.parameters())
        for parameter in layer.parameters():
            if parameter not in old:
                parameter.requires_grad_(own.weight.requires_grad)
        if init == "paper":
            own.reset_parameters()
            if own_norm is not None and hasattr(own_norm, "reset_parameters"):
                own_norm.reset_parameters()
        else:
            self.silence(layer)
        # The norm keeps its own flag: it may be frozen in evaluation mode.
        flag = own_norm is not None and own_norm.training
        layer.train(conv.training)
        if own_norm is not None:
            own_norm.train(flag)
        return layer


# ---------------------------------------------------------------------- what branches are made of


def branch_conv(
    conv: Any,
    kernel_size: Sequence[int],
    *,
    in_channels: int | None = None,
    out_channels: int | None = None,
    groups: int | None = None,
    dilation: Sequence[int] | None = None,
) -> nn.Sequential:
    """A convolution without bias whose window lies in the middle of `conv`'s, with `conv`'s stride and outputs.

    Padding is what is left of `conv`'s once the window is smaller; it can be negative (a crop), and is then a module
    of its own in front.

    Example:
        >>> branch_conv(nn.Conv2d(8, 8, 3, stride=2, padding=1), (1, 1))
        Sequential(
          (conv): Conv2d(8, 8, kernel_size=(1, 1), stride=(2, 2), bias=False)
        )
        >>> branch_conv(nn.Conv2d(4, 8, 3), (1, 1))
        Sequential(
          (crop): ZeroPad2d((-1, -1, -1, -1))
          (conv): Conv2d(4, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
        )
    """
    steps = tuple(conv.dilation if dilation is None else dilation)
    padding = inner_padding(conv, kernel_size, steps)
    own = all(before == after >= 0 for before, after in padding)
    inputs = conv.in_channels if in_channels is None else in_channels
    shares = conv.groups if groups is None else groups
    picks = len(kernel_size) == 2 and max(kernel_size) == 1 < max(conv.stride) and inputs // shares < 8
    inner = (PickingConv2d if picks and not (own and any(map(any, padding))) else CONVOLUTIONS[len(kernel_size)])(
        inputs,
        conv.out_channels if out_channels is None else out_channels,
        tuple(kernel_size),  # pyright: ignore[reportArgumentType]
        stride=conv.stride,
        padding=tuple(before for before, _ in padding) if own else 0,  # pyright: ignore[reportArgumentType]
        dilation=steps,  # pyright: ignore[reportArgumentType]
        groups=shares,
        bias=False,
        padding_mode=conv.padding_mode if own and any(before for before, _ in padding) else "zeros",
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    layers = nn.Sequential()
    if not own:
        for name, module in padding_modules(padding, conv.padding_mode).items():
            layers.add_module(name, module)
    layers.add_module("conv", inner)
    return layers


def inner_padding(conv: Any, kernel_size: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """The padding of a smaller window in the middle of `conv`'s, per dimension ``(before, after)``."""
    geometry = conv_geometry(conv)
    padding = []
    for (before, after), k, d, size, step in zip(
        geometry["padding"], conv.kernel_size, conv.dilation, kernel_size, dilation
    ):
        spare = d * (k - 1) - step * (size - 1)
        # In whole steps of the outer dilation, so that the taps fall on taps.
        front = d * ((k - 1) // 2) - step * ((size - 1) // 2)
        padding.append((before - front, after - (spare - front)))
    return padding


def padding_modules(padding: Sequence[tuple[int, int]], mode: str) -> dict[str, nn.Module]:
    """Modules that pad by a mode and crop: ``pad`` and ``crop``, those that are needed."""
    ndim = len(padding)
    grow = tuple(max(n, 0) for pair in reversed(padding) for n in pair)
    crop = tuple(min(n, 0) for pair in reversed(padding) for n in pair)
    modules: dict[str, nn.Module] = {}
    if any(grow):
        modules["pad"] = _PADS[mode][ndim - 1](grow)
    if any(crop):
        modules["crop"] = _PADS["zeros"][ndim - 1](crop)
    return modules


def norm_like(norm: nn.Module | None, conv: Any, channels: int | None = None) -> nn.Module:
    """A new batch norm for a branch: `norm`'s eps, momentum and kind, `conv`'s rank, device and dtype."""
    cls = nn.SyncBatchNorm if isinstance(norm, nn.SyncBatchNorm) else _NORMS[len(conv.kernel_size)]
    momentum = getattr(norm, "momentum", 0.1)
    return cls(
        conv.out_channels if channels is None else channels,
        eps=getattr(norm, "eps", 1e-5),
        momentum=0.1 if momentum is None else momentum,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


def has_identity(conv: Any) -> bool:
    """Is there an identity branch: as many outputs as inputs, at the same positions?

    >>> has_identity(nn.Conv2d(4, 4, 3, padding=1)), has_identity(nn.Conv2d(4, 4, 3, stride=2, padding=1))
    (True, False)
    """
    same = all(
        before == after == 0 for before, after in inner_padding(conv, [1] * len(conv.kernel_size), conv.dilation)
    )
    return conv.in_channels == conv.out_channels and set(conv.stride) == {1} and same


def conv_norm(conv: Any, norm: nn.Module | None, kernel_size: Any, **changes: Any) -> nn.Sequential:
    """A branch of a convolution without bias and a norm, its window in the middle of `conv`'s."""
    branch = branch_conv(conv, kernel_size, **changes)
    branch.add_module("norm", norm_like(norm, conv))
    return branch


def identity_norm(conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
    """The identity branch with its norm, where there is one."""
    return {"identity": nn.Sequential(norm_like(norm, conv))} if has_identity(conv) else {}
