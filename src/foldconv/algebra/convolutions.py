"""torch's convolutions: their classes and functions by number of dimensions, and what is done to their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import UnsupportedError

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
PLAIN = (*CONVOLUTIONS.values(), *TRANSPOSED.values())
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class _Undrawn:
    """A convolution whose constructor draws no values, for they are set next; drawing takes longer than the rest."""

    def reset_parameters(self) -> None:
        """Leave them."""


_UNDRAWN: dict[Any, Any] = {cls: type(cls.__name__, (_Undrawn, cls), {}) for cls in PLAIN}


def undrawn(cls: type, *args: Any, **kwargs: Any) -> Any:
    """One of torch's convolutions on the meta device, whose parameters are set next.

    >>> undrawn(nn.Conv2d, 3, 8, 3)
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    module = _UNDRAWN[cls](*args, **kwargs, device="meta")
    module.__class__ = cls
    return module


def as_tuple(value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """One integer per spatial dimension.

    >>> as_tuple(3, 2), as_tuple((1, 2), 2)
    ((3, 3), (1, 2))
    """
    return (int(value),) * ndim if isinstance(value, int) else tuple(int(v) for v in value)


def arguments_in_use(conv: Any) -> dict[str, Any]:
    """Stride, padding, dilation, groups and mode that the forward of an ``nn.Conv*d`` uses, whoever edited what.

    torch writes down at construction what is padded in every mode but zeros, and from then on reads that; a stride or
    a dilation may have become a single integer.

    Raises:
        UnsupportedError: for padding that is written down and that no arguments describe.

    >>> conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    >>> conv.padding, conv.stride = (2, 2), 2
    >>> arguments_in_use(conv)["padding"], arguments_in_use(conv)["stride"]
    ((1, 1), (2, 2))
    """
    ndim = len(taps_of(conv))
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        written = written_padding(conv)
        if padding != "same" or written != same_padding(conv):
            if any(before != after for before, after in written):
                raise UnsupportedError(
                    f"it pads {written} ({conv.padding_mode}), written down when it was built, and its padding="
                    f"{conv.padding!r} and dilation={conv.dilation} say otherwise; build it anew"
                )
            padding = tuple(before for before, _ in written)
    found = {
        "stride": as_tuple(conv.stride, ndim),
        "padding": padding if isinstance(padding, str) else as_tuple(padding, ndim),
        "dilation": as_tuple(conv.dilation, ndim),
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
    }
    return found | ({"output_padding": as_tuple(conv.output_padding, ndim)} if conv.transposed else {})


def taps_of(conv: Any) -> tuple[int, ...]:
    """The kernel size; the weight's, if there is one."""
    weight: Any = conv._parameters.get("weight")
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return tuple(conv.kernel_size)
    return tuple(weight.shape[2:])


def written_padding(conv: Any) -> tuple[tuple[int, int], ...]:
    """What torch wrote down at construction to be padded, ``(before, after)`` per dimension."""
    flat = conv._reversed_padding_repeated_twice
    return tuple((flat[i], flat[i + 1]) for i in reversed(range(0, len(flat), 2)))


def same_padding(conv: Any) -> tuple[tuple[int, int], ...]:
    """``padding="same"`` in numbers, ``(before, after)`` per dimension."""
    size = taps_of(conv)
    totals = [d * (k - 1) for d, k in zip(as_tuple(conv.dilation, len(size)), size)]
    return tuple((total // 2, total - total // 2) for total in totals)


def exchanged(weight: Tensor, groups: int) -> Tensor:
    """``(out, in / groups, *k)`` as ``(in, out / groups, *k)``, the form of a transposed convolution, and back.

    >>> exchanged(torch.zeros(6, 2, 3), 2).shape
    torch.Size([4, 3, 3])
    """
    return weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)


def plain_convolution(weight: Tensor, bias: Tensor | None, transposed: bool, **geometry: Any) -> _ConvNd:
    """torch's convolution with copies of a weight, ``(out, in / groups, *k)`` also for a transposed one, and a bias.

    Args:
        weight, bias: tensors of its dtype and device.
        transposed: scatter instead of gather.
        **geometry: its other arguments.
    """
    groups = geometry["groups"]
    cls = (TRANSPOSED if transposed else CONVOLUTIONS)[weight.dim() - 2]
    channels, out, size = weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:])
    module = undrawn(cls, channels, out, size, bias=bias is not None, **geometry)
    weight = exchanged(weight, groups) if transposed else weight
    module.weight = nn.Parameter(weight.detach().contiguous().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module


def compose_taps(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """``K[o,i,t] = Σ_{m,j} second[o,m,j] · first[m,i,t-j]`` per group; a full convolution of the taps."""
    ndim = first.dim() - 2
    middle = first.shape[0] // groups
    sizes = tuple(first.shape[2:]), tuple(second.shape[2:])
    if 1 in map(math.prod, sizes):
        # One of them is pointwise: a product of matrices, where the convolution below would mostly multiply padding.
        a, b = first.reshape(groups, middle, -1), second.reshape(groups, -1, middle, math.prod(sizes[1]))
        size = max(sizes, key=math.prod)
        if b.shape[3] == 1:
            return torch.matmul(b.squeeze(3), a).reshape(second.shape[0], first.shape[1], *size)
        # The taps go before the channels in between, so that it is one product; they come back as a view.
        rows = b.transpose(2, 3)
        product = torch.matmul(rows.flatten(1, 2), a).reshape(*rows.shape[:3], first.shape[1])
        return product.transpose(2, 3).reshape(second.shape[0], first.shape[1], *size)
    # The taps of `first` take the place of an image: batch = input channel, channels = groups × middle.
    image = first.reshape(groups, middle, *first.shape[1:]).transpose(1, 2)
    image = image.transpose(0, 1).reshape(first.shape[1], groups * middle, *first.shape[2:])
    flipped = second.flip(tuple(range(2, 2 + ndim)))
    composed = CONV[ndim](image, flipped, padding=tuple(k - 1 for k in second.shape[2:]), groups=groups)
    return composed.transpose(0, 1)


class PickingConv2d(nn.Conv2d):
    """A strided 1×1 convolution without padding that picks the pixels first.

    With channels last the gradient of its weight writes past its memory in torch 2.15 (oneDNN 3.13, AVX2) if a group
    has few channels, as a stem's 1×1 branch does; the plain network has no such convolution.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        down, right = self.stride
        return F.conv2d(input[..., ::down, ::right], weight, bias, groups=self.groups)

    def _get_name(self) -> str:
        return "Conv2d"
