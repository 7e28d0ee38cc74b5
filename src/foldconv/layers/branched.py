"""`BranchedConv`: a convolution and its norm, trained as parallel branches with norms of their own.

The norm inside a branch uses the batch while training, so the branches run on feature maps; only the evaluation
function is linear, and that is what folds. The branches are ordinary modules in a tree of `Sum` and
``nn.Sequential``; `kernel_of` folds the tree, so a method says only which branches there are.

The norm that followed the convolution moves into the main branch. `NormPlace` keeps its place in the network, so
that folding can put a norm back and the folded network has the keys of the original.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Kernel, kernel_of
from ..algebra.norms import scale_and_shift
from ..algebra.rules import conv_geometry
from .foldable import CONVOLUTIONS, Foldable, realize_like

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_PADS = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


class BranchedConv(Foldable):
    """A tree of branches in the place of a convolution.

    Args:
        body: the branches, a tree that `kernel_of` understands.
        conv: the convolution of the main branch, itself in `body`; the fold takes its arguments and layout.
        method: the config that built the body.

    Raises:
        UnsupportedError: from `fold`, when the tree has no exact kernel.
    """

    structure = ("_path", "_method")

    def __init__(self, body: nn.Module, conv: nn.Module, method: Any):
        super().__init__()
        self.body = body
        self._path = next(name for name, module in body.named_modules() if module is conv)
        self._method = method

    @property
    def method(self) -> Any:
        """The config that rebuilds this layer."""
        return self._method

    @property
    def conv(self) -> Any:
        """The convolution of the main branch."""
        return self.body.get_submodule(self._path)

    @property
    def norm(self) -> Any:
        """The norm of the main branch, or None."""
        branch = self.body.get_submodule(self._path.rpartition(".")[0])
        return getattr(branch, "norm", None)

    def forward(self, input: Tensor) -> Tensor:
        """Run the branches; shapes as in the convolution."""
        return self.body(input)

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The evaluation-mode kernel, in the main convolution's window."""
        return kernel_of(self.body, in_channels=self.conv.in_channels, ndim=len(self.conv.kernel_size), dtype=dtype)

    def realize(self, kernel: Kernel) -> nn.Module:
        """A plain convolution like the main branch's."""
        return realize_like(self.conv, kernel).train(self.training)

    def regularization(self) -> Tensor | None:
        """The method's penalty, if it has one."""
        penalty = getattr(self._method, "penalty", None)
        return None if penalty is None else penalty(self)


class NormPlace(nn.Module):
    """Where a norm was before a `BranchedConv` took it in: passes on what it gets (to the norm's activation, if any).

    Args:
        layer: the layer that has the norm now.
        norm: the norm, for its class and its place in the state dict after folding.
        rest: what the norm's module did besides: its activation, or ``nn.Identity()``.
    """

    def __init__(self, layer: BranchedConv, norm: nn.Module, rest: nn.Module):
        super().__init__()
        self.rest = rest
        # In a list: neither the layer nor the norm is a child, and both are found again in copies.
        self.link: list[Any] = [layer, norm]

    def forward(self, input: Tensor) -> Tensor:
        """What came after the norm."""
        return self.rest(input)

    def restore(self, kernel: Kernel) -> tuple[Kernel, Any]:
        """A kernel without bias and a norm after it that compute `kernel` together.

        The norm keeps its class, flags and dtype; its statistics become those of a norm that only shifts.
        """
        layer, norm = self.link[0], copy.deepcopy(self.link[1])
        # The layer has moved with the model since; the norm it was built from may not have.
        norm = norm.to(layer.norm.running_var.device, layer.norm.running_var.dtype)
        shift = torch.zeros_like(norm.running_mean) if kernel.bias is None else kernel.bias
        with torch.no_grad():
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            if norm.weight is not None:
                norm.weight.fill_(1)
            if norm.bias is not None:
                norm.bias.copy_(shift)
            else:
                norm.running_mean.copy_(-shift)
            # The statistics were rounded to the norm's type: what its scale really is, the kernel makes up for.
            scale, _ = scale_and_shift(norm)
        bias = None if layer.conv.bias is None else torch.zeros_like(kernel.weight[:, 0].flatten(1)[:, 0])
        return kernel.replace(bias=None).scale(1 / scale, bias), norm.train(self.training)


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
        >>> branch_conv(nn.Conv2d(4, 8, 3, stride=2, padding=1), (1, 1))
        Sequential(
          (conv): Conv2d(4, 8, kernel_size=(1, 1), stride=(2, 2), bias=False)
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
    inner = CONVOLUTIONS[len(kernel_size)](
        conv.in_channels if in_channels is None else in_channels,
        conv.out_channels if out_channels is None else out_channels,
        tuple(kernel_size),  # pyright: ignore[reportArgumentType]
        stride=conv.stride,
        padding=tuple(before for before, _ in padding) if own else 0,  # pyright: ignore[reportArgumentType]
        dilation=steps,  # pyright: ignore[reportArgumentType]
        groups=conv.groups if groups is None else groups,
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
