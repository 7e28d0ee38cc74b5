"""The kernel algebra: a linear layer as a value that can be added, chained, scaled and turned into a convolution.

A linear layer of a convolutional network is a function of *positions*. With tap ``j`` of the kernel standing
at offset ``j·dilation - before``,

    convolution             y[n]                = bias + Σ_j  w[j] · x[n·stride + j·dilation - before]
    transposed convolution  y[n·stride + j·dilation - before] += w[j] · x[n]   (bias added once)

where ``x`` is extended beyond its borders by the padding mode. Everything below follows from that line: two
kernels add when their offsets are written on one grid, and chain when the second never looks at a border value
that the first would have computed differently. Where that cannot be had exactly, the operation raises
`UnsupportedError`; nothing here approximates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from ..errors import UnsupportedError
from .convolutions import CONV, CONV_TRANSPOSE, compose_taps, exchanged, plain_convolution


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A linear, position-invariant map between feature maps.

    Args:
        weight: taps, shape ``(out, in / groups, *k)``, also for a transposed kernel.
        bias: shape ``(out,)``, or None for none (which lets more things chain than a bias of zeros).
        stride, dilation: one integer per spatial dimension, in input samples.
        padding: ``(before, after)`` per spatial dimension, in input samples; negative values crop. For a
            transposed kernel: how many output samples are cropped (a negative *after* is output padding).
        groups: channel groups.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``; irrelevant when nothing is padded.
        transposed: scatter instead of gather.

    Raises:
        UnsupportedError: from an operation that has no exact result.

    Example:
        >>> conv = Kernel(torch.ones(1, 1, 3, 3), padding=((1, 1), (1, 1)))
        >>> point = Kernel(torch.full((1, 1, 1, 1), 2.0))
        >>> conv.add(point).weight[0, 0]
        tensor([[1., 1., 1.],
                [1., 3., 1.],
                [1., 1., 1.]])
        >>> conv.then(point).weight.sum()
        tensor(18.)
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False

    def __post_init__(self) -> None:
        defaults: dict[str, Any] = {"stride": 1, "padding": (0, 0), "dilation": 1}
        for name, default in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * self.ndim)

    # ------------------------------------------------------------------ what it is

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return self.weight.dim() - 2

    @property
    def size(self) -> tuple[int, ...]:
        """Taps per spatial dimension."""
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight.shape[0]

    @property
    def pads(self) -> tuple[bool, ...]:
        """Per dimension: does the kernel look beyond the border?"""
        return tuple(before > 0 or after > 0 for before, after in self.padding)

    @property
    def growth(self) -> tuple[int, ...]:
        """Output length minus input length at stride 1, per dimension.

        Two kernels of one stride give outputs of one length, for every input length, when this agrees.
        """
        sign = -1 if self.transposed else 1
        return tuple(
            sign * (before + after - d * (k - 1))
            for (before, after), d, k in zip(self.padding, self.dilation, self.size)
        )

    @property
    def is_scale(self) -> bool:
        """One number per channel and nothing else (a norm is such a kernel)."""
        return (
            self.groups == self.in_channels == self.out_channels
            and set(self.size) == {1}
            and set(self.stride) == {1}
            and set(self.padding) == {(0, 0)}
            and not self.transposed
        )

    def replace(self, **changes: Any) -> Kernel:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    # ------------------------------------------------------------------ elementary kernels

    @staticmethod
    def scaling(scale: Tensor, bias: Tensor | None, ndim: int) -> Kernel:
        """``y = scale·x + bias`` per channel; `scale` and `bias` have shape ``(channels,)``."""
        return Kernel(scale.reshape(-1, 1, *(1,) * ndim), bias, groups=scale.numel())

    @staticmethod
    def identity(channels: int, ndim: int, dtype: torch.dtype = torch.float64) -> Kernel:
        """``y = x``.

        >>> Kernel.identity(4, 2).weight.shape
        torch.Size([4, 1, 1, 1])
        """
        return Kernel.scaling(torch.ones(channels, dtype=dtype), None, ndim)

    @staticmethod
    def average(channels: int, size: Sequence[int], divisor: int | None = None, **geometry: Any) -> Kernel:
        """Average pooling over a window of `size`; `geometry` is stride and padding as in the constructor."""
        value = 1.0 / (divisor or math.prod(size))
        return Kernel(torch.full((channels, 1, *size), value, dtype=torch.float64), groups=channels, **geometry)

    @staticmethod
    def permutation(order: Sequence[int], ndim: int, dtype: torch.dtype = torch.float64) -> Kernel:
        """Output channel ``c`` is input channel ``order[c]``.

        >>> Kernel.permutation([1, 0], 1).weight[:, :, 0]
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
        """
        return Kernel(torch.eye(len(order), dtype=dtype)[list(order)].reshape(len(order), len(order), *(1,) * ndim))

    # ------------------------------------------------------------------ same function, other form

    def grouped(self, groups: int) -> Kernel:
        """The same function written with fewer groups (a divisor of the present ones), zeros filled in."""
        if groups == self.groups:
            return self
        merge, (out, per_group) = self.groups // groups, self.weight.shape[:2]
        blocks = self.weight.reshape(groups, merge, out // self.groups, per_group, *self.size)
        eye = torch.eye(merge, dtype=self.weight.dtype, device=self.weight.device)
        # (g, m, o, i, k) ⊗ (m, n) -> (g, m, o, n, i, k): block m reads only its own channels.
        wide = blocks.unsqueeze(3) * eye.reshape(1, merge, 1, merge, 1, *(1,) * self.ndim)
        return self.replace(weight=wide.reshape(out, per_group * merge, *self.size), groups=groups)

    def dilated(self, dilation: Sequence[int]) -> Kernel:
        """The same function written with a smaller dilation (a divisor of the present one), zeros between taps."""
        weight = self.weight
        for axis, (old, new) in enumerate(zip(self.dilation, dilation), start=2):
            k, step = weight.shape[axis], old // new
            if k > 1 and step > 1:
                shape = list(weight.shape)
                shape[axis] = (k - 1) * step + 1
                index = torch.arange(0, shape[axis], step, device=weight.device)
                weight = weight.new_zeros(shape).index_copy(axis, index, weight)
        return self.replace(weight=weight, dilation=tuple(dilation))

    def embedded(self, before: Sequence[int], after: Sequence[int]) -> Kernel:
        """The same function in a larger window: zero taps added in front and behind, padding grown to match."""
        pads = [n for pair in reversed(list(zip(before, after))) for n in pair]
        if not any(pads):
            return self
        padding = tuple(
            (b + d * nb, a + d * na) for (b, a), d, nb, na in zip(self.padding, self.dilation, before, after)
        )
        return self.replace(weight=F.pad(self.weight, pads), padding=padding)

    # ------------------------------------------------------------------ operations

    def scale(self, scale: Tensor, bias: Tensor | None = None) -> Kernel:
        """The kernel followed by ``y = scale·x + bias`` per output channel."""
        return self.then(Kernel.scaling(scale, bias, self.ndim))

    def masked(self, mask: Tensor) -> Kernel:
        """The kernel with its taps multiplied by a mask that broadcasts to ``(out, in / groups, *k)``."""
        return self.replace(weight=self.weight * mask)

    def add(self, other: Kernel) -> Kernel:
        """``y = self(x) + other(x)``, both written on one grid of offsets.

        Raises:
            UnsupportedError: when channels, stride or output length differ, or both pad and in different modes.
        """
        a, b = self, other
        for what in ("ndim", "in_channels", "out_channels", "stride", "transposed"):
            if getattr(a, what) != getattr(b, what):
                raise UnsupportedError(f"branches cannot be added: {what} is {getattr(a, what)} and {getattr(b, what)}")
        if a.growth != b.growth:
            raise UnsupportedError(
                f"branches cannot be added: at stride 1 one output is {a.growth} longer than its input, "
                f"the other {b.growth}; give them the same padding - dilation·(kernel_size - 1)"
            )
        mode = _common_mode(a, b, "added")
        groups = math.gcd(a.groups, b.groups)
        a, b = a.grouped(groups), b.grouped(groups)
        dilation, before, after = [], ([], []), ([], [])
        for i in range(a.ndim):
            windows = [(-k.padding[i][0], k.dilation[i] * (k.size[i] - 1)) for k in (a, b)]
            steps = [k.dilation[i] for k in (a, b) if k.size[i] > 1]
            d = math.gcd(*steps, windows[0][0] - windows[1][0]) or 1
            first = min(start for start, _ in windows)
            last = max(start + extent for start, extent in windows)
            dilation.append(d)
            for j, (start, extent) in enumerate(windows):
                before[j].append((start - first) // d)
                after[j].append((last - start - extent) // d)
        a = a.dilated(dilation).embedded(before[0], after[0])
        b = b.dilated(dilation).embedded(before[1], after[1])
        return a.replace(weight=a.weight + b.weight, bias=_add(a.bias, b.bias), padding_mode=mode)

    def then(self, second: Kernel) -> Kernel:
        """``y = second(self(x))`` as one kernel.

        Raises:
            UnsupportedError: when the borders would differ, with the reason.
        """
        first = self
        if first.out_channels != second.in_channels or first.ndim != second.ndim:
            raise UnsupportedError(
                f"layers cannot be chained: the first gives {first.out_channels} channels in {first.ndim}-d, "
                f"the second expects {second.in_channels} in {second.ndim}-d"
            )
        if second.is_scale:
            weight = first.weight * second.weight.reshape(-1, 1, *(1,) * first.ndim)
            bias = None if first.bias is None else first.bias * second.weight.flatten()
            return first.replace(weight=weight, bias=_add(bias, second.bias))
        if first.transposed or second.transposed:
            return _chain_transposed(first, second)
        mode = _check_borders(first, second)
        outer = tuple(s * d for s, d in zip(first.stride, second.dilation))
        dilation = tuple(
            math.gcd(*([d1] if k1 > 1 else []), *([d2] if k2 > 1 else [])) or 1
            for d1, k1, d2, k2 in zip(first.dilation, first.size, outer, second.size)
        )
        spread = second.replace(dilation=outer).dilated(dilation)
        if first.is_scale:
            # One factor per channel scales the second kernel's inputs; its groups stay.
            groups = second.groups
            factors = first.weight.reshape(groups, 1, -1).expand(-1, second.out_channels // groups, -1)
            weight = spread.weight * factors.reshape(second.out_channels, -1, *(1,) * second.ndim)
        elif math.prod(first.size) == 1 and second.groups == second.in_channels == second.out_channels:
            # One window per channel multiplies the first kernel's outputs; its groups stay.
            groups, weight = first.groups, first.weight * spread.weight
        else:
            groups = math.gcd(first.groups, second.groups)
            taps = first.grouped(groups).dilated(dilation).weight
            weight = compose_taps(taps, spread.grouped(groups).weight, groups)
        bias = second.bias
        if first.bias is not None:
            sums = second.weight.flatten(2).sum(2).unflatten(0, (second.groups, -1))
            carried = (sums @ first.bias.reshape(second.groups, -1, 1)).flatten()
            bias = _add(carried, bias)
        return Kernel(
            weight=weight,
            bias=bias,
            stride=tuple(s * t for s, t in zip(first.stride, second.stride)),
            padding=tuple(
                (b1 + s * b2, a1 + s * a2) for (b1, a1), s, (b2, a2) in zip(first.padding, first.stride, second.padding)
            ),
            dilation=dilation,
            groups=groups,
            padding_mode=mode,
        )

    # ------------------------------------------------------------------ use

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to a feature map of shape ``(batch, in, *spatial)``: pad once, then convolve."""
        if self.transposed:
            weight = exchanged(self.weight, self.groups)
            y = CONV_TRANSPOSE[self.ndim](x, weight, stride=self.stride, groups=self.groups, dilation=self.dilation)
            y = F.pad(y, [-n for pair in reversed(self.padding) for n in pair])
            return y if self.bias is None else y + self.bias.reshape(1, -1, *(1,) * self.ndim)
        grow = [max(n, 0) for pair in reversed(self.padding) for n in pair]
        crop = [min(n, 0) for pair in reversed(self.padding) for n in pair]
        if any(grow):
            x = F.pad(x, grow, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        if any(crop):
            x = F.pad(x, crop)
        conv = CONV[self.ndim]
        return conv(x, self.weight, self.bias, stride=self.stride, dilation=self.dilation, groups=self.groups)

    def to_module(self) -> _ConvNd:
        """The plain ``nn.Conv*d`` or ``nn.ConvTranspose*d`` that computes this kernel, of its dtype and device.

        torch pads both sides of a dimension alike (or the way ``padding="same"`` does), a kernel may not; the window is
        then enlarged with zero taps until it does. The function is the same, the cost grows.

        Example:
            >>> Kernel(torch.ones(4, 2, 3, 3), padding=((1, 1), (1, 1)), groups=2).to_module()
            Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=False)
            >>> Kernel(torch.ones(1, 1, 2, 2), padding=((0, 1), (0, 1))).to_module()
            Conv2d(1, 1, kernel_size=(2, 2), stride=(1, 1), padding=same, bias=False)
        """
        if self.transposed:
            k = self._with_room()
            pads = {"output_padding": tuple(before - after for before, after in k.padding)}
        else:
            k = self if self._pads_as_same else self._symmetric()
            pads = {"padding_mode": k.padding_mode if any(k.pads) else "zeros"}
        padding = "same" if k._pads_as_same and not k.transposed else tuple(before for before, _ in k.padding)
        geometry = {"stride": k.stride, "padding": padding, "dilation": k.dilation, "groups": k.groups, **pads}
        return plain_convolution(k.weight, k.bias, k.transposed, **geometry)

    @property
    def _pads_as_same(self) -> bool:
        """Does ``padding="same"`` (stride 1, the odd sample of padding behind) describe this kernel's padding?"""
        uneven = any(before != after for before, after in self.padding)
        return uneven and all(
            s == 1 and before + after == d * (k - 1) and before == (d * (k - 1)) // 2
            for s, (before, after), d, k in zip(self.stride, self.padding, self.dilation, self.size)
        )

    def _symmetric(self) -> Kernel:
        """The kernel in a window whose padding is the same on both sides."""
        target = [max(before, after, 0) for before, after in self.padding]
        # A pointwise dimension keeps its dilation where that costs nothing, so that arguments survive.
        kernel = self.dilated(
            [
                d if k == 1 and before == after == t else math.gcd(d if k > 1 else 0, t - before, t - after) or 1
                for d, k, t, (before, after) in zip(self.dilation, self.size, target, self.padding)
            ]
        )
        front = [(t - before) // d for t, (before, _), d in zip(target, self.padding, kernel.dilation)]
        back = [(t - after) // d for t, (_, after), d in zip(target, self.padding, kernel.dilation)]
        return kernel.embedded(front, back)

    def _with_room(self) -> Kernel:
        """A transposed kernel that torch can crop: ``before ≥ max(after, 0)``, by no more than output padding may be.

        Zero taps are added in front and behind, and cropped away again.
        """
        if self.padding_mode != "zeros":
            raise UnsupportedError("a transposed convolution has zero padding only")
        need = [max(after - before, -before, 0) for before, after in self.padding]
        kernel = self.dilated([math.gcd(d, n) if n else d for d, n in zip(self.dilation, need)])
        kernel = kernel.embedded([n // d for n, d in zip(need, kernel.dilation)], [0] * self.ndim)
        spare = [before - after for before, after in kernel.padding]
        # torch allows an output padding below max(stride, dilation).
        limit = [max(s, d) for s, d in zip(kernel.stride, kernel.dilation)]
        behind = [max(0, math.ceil((n - m + 1) / d)) for n, m, d in zip(spare, limit, kernel.dilation)]
        return kernel.embedded([0] * self.ndim, behind)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _common_mode(a: Kernel, b: Kernel, verb: str) -> str:
    """The padding mode of a result; a kernel that pads nothing has no say."""
    modes = {k.padding_mode for k in (a, b) if any(k.pads) and not k.transposed}
    if len(modes) > 1:
        raise UnsupportedError(f"layers with padding modes {sorted(modes)} cannot be {verb} exactly; use one mode")
    return modes.pop() if modes else "zeros"


def _check_borders(first: Kernel, second: Kernel) -> str:
    """The padding mode of the chain, or `UnsupportedError` where the second layer's padding is not the first's.

    The second layer pads the first one's *output*. The composed kernel sees the first one's *response to the
    padded input* instead. The two agree when, in each padded dimension, the first layer is pointwise and either
    keeps zeros zero (no bias; zero padding) or commutes with the extension (other modes), or when both are circular
    and of equal length.
    """
    where = [i for i, pads in enumerate(second.pads) if pads]
    if not where:
        return first.padding_mode if any(first.pads) else "zeros"
    mode = _common_mode(first, second, "chained")
    if mode == "zeros" and first.bias is not None:
        raise UnsupportedError(
            "a layer with a bias (or norm) followed by zero padding has no exact fold at the borders: the padding "
            "would have to hold the bias; pad before the first layer instead"
        )
    for i in where:
        pointwise = first.size[i] == 1
        before, after = first.padding[i]
        if mode == "zeros":
            exact = pointwise and min(before, after) >= 0
        elif mode == "replicate":
            # The first output already ends on a border value, which is then repeated.
            exact = pointwise and before >= 0 and after >= first.stride[i] - 1
        else:
            exact = first.stride[i] == 1 and (
                (pointwise and before == after == 0) or (mode == "circular" and first.growth[i] == 0)
            )
        if not exact:
            raise UnsupportedError(
                f"a layer of kernel size {first.size}, stride {first.stride}, padding {first.padding} followed by one "
                f"that pads {second.padding} ({mode}) has no exact fold at the borders; put all padding in the first"
            )
    return mode


def _chain_transposed(first: Kernel, second: Kernel) -> Kernel:
    """Chains in which one side is a transposed convolution; the other has to be pointwise."""

    def pointwise(k: Kernel) -> bool:
        return not k.transposed and set(k.size) == set(k.stride) == {1} and set(k.padding) == {(0, 0)}

    groups = math.gcd(first.groups, second.groups)
    if first.transposed and pointwise(second):
        body, weight_first, weight_second = first, first.grouped(groups).weight, second.grouped(groups).weight
        bias = second.bias
        if first.bias is not None:
            bias = second.replace(bias=second.bias)(first.bias.reshape(1, -1, *(1,) * first.ndim)).flatten()
    elif second.transposed and pointwise(first) and first.bias is None:
        body, weight_first, weight_second = second, first.grouped(groups).weight, second.grouped(groups).weight
        bias = second.bias
    else:
        raise UnsupportedError(
            "a transposed convolution chains exactly only with a pointwise layer after it, or a pointwise layer "
            "without bias or norm before it"
        )
    return body.replace(weight=compose_taps(weight_first, weight_second, groups), bias=bias, groups=groups)
