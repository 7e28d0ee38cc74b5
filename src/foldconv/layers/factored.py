"""`FactoredConv`: a convolution whose kernel is a chain of smaller kernels.

    kernel = factor_l ∘ ... ∘ factor_1        taps add:  K[t] = Σ_{j_1 + ... + j_l = t}  F_l[j_l] ··· F_1[j_1]

No parameter has the kernel's shape, so ``weight`` is a property: the composed kernel. What is written into it, or
assigned to it, is found by the factors (`start_from`). All padding stands
before the chain and all stride behind it, so the chain is one convolution, borders included, for every padding mode.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..algebra import Kernel
from ..algebra.convolutions import compose_taps
from ..algebra.rules import conv_geometry
from ..errors import UnsupportedError
from ..ops import is_recorded
from .composed import ComposedConv
from .foldable import lacks_values, layout_of, name_among_callers
from .written import Written

Order = int | tuple["Order", "Order"]
"""The number of a factor, or what is composed first and what behind it."""


class FactoredConv(ComposedConv):
    """Mixin for ``nn.Conv*d`` subclasses that are chains; a subclass says what the factors are made of.

    A rank class calls `build` after torch's constructor. By default the parameters are the factors themselves.
    """

    composed_from = ()
    scales_with_weight = True  # it is the kernel
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shape of each factor, first to last: ``(width, previous width / groups, *taps)``."""

    def build(self, shapes: Sequence[tuple[int, ...]], parameters: dict[str, tuple[int, ...]]) -> None:
        """Replace torch's weight by the parameters of the factors, and initialize them."""
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        del self._parameters["weight"]
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **like)))
        self.shapes, self.composed_from = tuple(shapes), tuple(parameters)
        self._cost, self._order = cheapest(self.shapes)
        self._parameter_shapes = parameters
        self.reset_parameters()

    # ------------------------------------------------------------------ for subclasses

    def factor_kernels(self, *parameters: Tensor) -> list[Tensor]:
        """The factors from the tensors named by ``composed_from``, differentiable."""
        return list(parameters)

    def run_factor(self, index: int, input: Tensor, **geometry: Any) -> Tensor:
        """One factor on feature maps; `geometry` as in `Kernel`."""
        return Kernel(getattr(self, self.composed_from[index]), **geometry)(input)

    def factorize(self, kernel: Tensor) -> list[Tensor]:
        """Factors whose chain is `kernel`, given the parameters as `reset_extra_parameters` left them.

        Raises:
            UnsupportedError: when the widths do not suffice.
        """
        return hold(kernel, self._drawn(), self.groups)

    def draw(self) -> None:
        """Draw every factor as the paper does; by default like torch's convolutions."""
        for name in self.composed_from:
            nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))

    def set_factors(self, values: list[Tensor]) -> None:
        """Write what `factorize` found into the parameters."""
        for name, value in zip(self.composed_from, values):
            getattr(self, name).copy_(value)

    # ------------------------------------------------------------------ the rest follows

    def shapes_beside(self, parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """As they were built."""
        return self._parameter_shapes

    def compose(self, *parameters: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The chain as one kernel of shape ``(out, in / groups, *kernel_size)``."""
        kernel = self._chain(self.factor_kernels(*parameters), self._order)
        return kernel.contiguous(memory_format=layout_of(self._widest(parameters), kernel))

    def _chain(self, factors: Sequence[Tensor], order: Order) -> Tensor:
        if isinstance(order, int):
            return factors[order]
        first, second = (self._chain(factors, part) for part in order)
        return compose_taps(first, second, self.groups)

    def feature_forward(self, input: Tensor) -> Tensor:
        """The factors on feature maps, one after the other."""
        self.checked_parameters()
        plain = conv_geometry(self)
        first = {name: plain[name] for name in ("padding", "padding_mode")}
        last = {"stride": plain["stride"]}
        between = {name: plain[name] for name in ("dilation", "groups")}
        y, end = input, len(self.shapes) - 1
        for i in range(end + 1):
            y = self.run_factor(i, y, **between, **(first if i == 0 else {}), **(last if i == end else {}))
        return y if self.bias is None else y + self.bias.reshape(1, -1, *(1,) * len(self.kernel_size))

    @torch.no_grad()
    def start_from(self, kernel: Tensor) -> None:
        """Become the plain convolution with this kernel; what the factors had learned is forgotten.

        Raises:
            UnsupportedError: when no chain of these widths is known to give it; the layer is then as it was.
        """
        before = [getattr(self, name).clone() for name in self.composed_from]
        try:
            self.reset_extra_parameters()
            self.set_factors(self.factorize(kernel.detach().to("meta" if kernel.is_meta else "cpu", torch.float64)))
        except UnsupportedError:
            for name, value in zip(self.composed_from, before):
                getattr(self, name).copy_(value)
            raise

    def reset_extra_parameters(self) -> None:
        """Draw every factor; `start_from` then sets those that hold the kernel."""
        self.draw()

    def reset_parameters(self) -> None:
        """Initialize as the paper does; the bias as torch does."""
        if not self.composed_from:  # inside torch's constructor
            _ConvNd.reset_parameters(self)  # pyright: ignore[reportArgumentType]
            return
        self.draw()
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self._kernel_shape()[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    def composition_cost(self) -> int:
        """Multiply-adds of chaining, in the cheapest order."""
        return self._cost

    # ------------------------------------------------------------------ weight

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The composed kernel; the layer composes what is written into it in place, or assigned."""
        if not self.composed_from:  # inside torch's constructor, which makes a plain layer first
            plain = self._parameters.get("weight")
            if plain is None:
                raise AttributeError("weight")
            return plain
        kernel = self.kernel()
        if is_recorded() or type(kernel) is not Tensor:
            return kernel
        trains = any(getattr(self, name).requires_grad for name in self.composed_from)
        # Where no gradients are recorded it still says whether it trains, as a Parameter would.
        kernel = kernel if kernel.requires_grad == trains else kernel.detach().requires_grad_(trains)
        return Written.of(self, kernel)

    def blank_weight(self) -> Tensor:
        """A tensor with the properties of ``weight``, not composed: its values are anything."""
        parameters = [getattr(self, name) for name in self.composed_from]
        like = self._widest(parameters)
        shape = self._kernel_shape()
        blank = like.new_empty(shape).contiguous(memory_format=layout_of(like, like.new_empty(shape, device="meta")))
        return blank.requires_grad_(any(p.requires_grad for p in parameters))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.composed_from:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if shape != self._kernel_shape():
                raise UnsupportedError(
                    f"{name_among_callers(self)}: weight is composed from {', '.join(self.composed_from)} and becomes "
                    f"what is assigned; expected a tensor of shape {self._kernel_shape()}, received {shape}; fold first"
                )
            self.start_from(value)
            return
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        plain = state_dict.get(prefix + "weight")
        if plain is None or any(prefix + name in state_dict for name in self.composed_from):
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        # A plain convolution's checkpoint.
        rest = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        super()._load_from_state_dict(rest, prefix, *args)
        errors: list[str] = args[-1]
        if lacks_values(self, prefix, [plain], errors):
            return
        if tuple(plain.shape) != self._kernel_shape():
            errors.append(
                f"size mismatch for {prefix}weight: copying a param with shape {tuple(plain.shape)} from checkpoint, "
                f"the shape in current model is {self._kernel_shape()}."
            )
            return
        try:
            self.start_from(plain)
        except UnsupportedError as error:
            errors.append(f"{prefix}weight: {error}")

    def _kernel_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _widest(self, parameters: Sequence[Tensor]) -> Tensor:
        """The parameter with most taps, whose memory format the kernel takes."""
        return max(parameters, key=lambda p: math.prod(p.shape[2:]))

    def _drawn(self) -> list[Tensor]:
        factors = self.factor_kernels(*(getattr(self, name).detach() for name in self.composed_from))
        return [f.to("meta" if f.is_meta else "cpu", torch.float64) for f in factors]


def cheapest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, Order]:
    """The multiply-adds of a chain of factors, and the order of composing that needs the fewest.

    Composing two, every tap of one meets every tap of the other.

    Args:
        shapes: of the factors, first to last, ``(width, previous width / groups, *taps)``.

    Example:
        >>> cheapest([(16, 4, 1), (32, 16, 3), (8, 32, 1)])  # from 4 channels to 8
        (9216, ((0, 1), 2))
        >>> cheapest([(32, 8, 1), (16, 32, 3), (4, 16, 1)])
        (9216, (0, (1, 2)))
    """

    @functools.cache
    def best(begin: int, end: int) -> tuple[int, Order]:
        if end - begin == 1:
            return 0, begin
        found = []
        for middle in range(begin + 1, end):
            (left, first), (right, second) = best(begin, middle), best(middle, end)
            taps = math.prod(size(begin, middle)) * math.prod(size(middle, end))
            own = shapes[end - 1][0] * shapes[middle][1] * shapes[begin][1] * taps
            found.append((left + right + own, (first, second)))
        return min(found, key=lambda cost_and_order: cost_and_order[0])

    def size(begin: int, end: int) -> list[int]:
        return [sum(k) - (end - begin - 1) for k in zip(*(shape[2:] for shape in shapes[begin:end]))]

    return best(0, len(shapes))


def stack_sizes(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Taps of the kernels of a stack of 3-tap kernels that spans `kernel_size` (odd sizes).

    Example:
        >>> stack_sizes((7, 7)), stack_sizes((3, 5))
        ([(3, 3), (3, 3), (3, 3)], [(1, 3), (3, 3)])
    """
    layers = max(k // 2 for k in kernel_size)
    # A shorter dimension gets its taps last, where they find the kernel already spread over the others.
    return [tuple(3 if layers - i <= k // 2 else 1 for k in kernel_size) for i in range(layers)]


def hold(kernel: Tensor, drawn: list[Tensor], groups: int) -> list[Tensor]:
    """Factors whose chain is exactly `kernel`: one holds its taps, those beside it only shift.

    With windows of w taps (what the holder reaches, with the factor behind it), a kernel of k taps is cut into ⌈k / w⌉
    pieces per dimension. The factors before the holder carry one copy of the input per piece, shifted to where the
    piece starts; a factor behind it shifts and adds. Channels not needed for that keep their drawn values: nothing
    reads them yet, so the function does not change, but they have gradients to learn from.

    Args:
        kernel: ``(out, in / groups, *k)``.
        drawn: the factors as they are, ``(width, previous width / groups, *taps)``; not changed.
        groups: channel groups of every factor.

    Returns:
        One tensor per factor.

    Raises:
        UnsupportedError: when the inner widths are too small for the copies.

    Example:
        >>> drawn = [torch.randn(16, 2, 3, 3), torch.randn(5, 16, 3, 3)]
        >>> kernel = torch.randn(5, 2, 5, 5)
        >>> first, second = hold(kernel, drawn, 1)
        >>> torch.allclose(Kernel(first).then(Kernel(second)).weight, kernel)
        True
    """
    size, (out, channels) = tuple(kernel.shape[2:]), (kernel.shape[0] // groups, kernel.shape[1])
    inner = tuple(f.shape[0] // groups for f in drawn[:-1])
    needed: list[tuple[int, ...]] = []
    for behind in (0, 1):
        holder = len(drawn) - 1 - behind
        taps, last = drawn[holder].shape[2:], drawn[-1].shape[2:] if behind else (1,) * len(size)
        windows = [a + b - 1 for a, b in zip(taps, last)]
        starts = [[min(n * w, k - w) for n in range(math.ceil(k / w))] for k, w in zip(size, windows)]
        steps = [list(range(0, b, min(a, b - 1) or 1)) for a, b in zip(taps, last)]
        copies, sums = math.prod(map(len, starts)), math.prod(map(len, steps))
        needed.append((copies * channels,) * holder + (sums * out,) * behind)
        if all(have >= need for have, need in zip(inner, needed[-1])):
            return _hold(kernel, drawn, groups, holder, starts, steps)
    wanted = " or ".join(map(str, dict.fromkeys(needed)))
    raise UnsupportedError(
        f"a trained kernel of size {size} with {channels} input channels per group fits a chain whose inner widths per "
        f"group are at least {wanted}, received {inner}; widen the chain, start with init='paper', or exclude the layer"
    )


def _hold(
    kernel: Tensor, drawn: list[Tensor], groups: int, holder: int, starts: list[list[int]], steps: list[list[int]]
) -> list[Tensor]:
    ndim = kernel.dim() - 2
    blocks = kernel.reshape(groups, -1, *kernel.shape[1:])
    out, channels = blocks.shape[1:3]
    factors = [f.clone().reshape(groups, -1, *f.shape[1:]) for f in drawn]
    inputs, outputs = torch.arange(channels), torch.arange(out)
    pieces, sums = list(itertools.product(*starts)), list(itertools.product(*steps))

    gone = [0] * ndim
    for i, factor in enumerate(factors[:holder]):
        taps = factor.shape[3:]
        factor[:, : len(pieces) * channels] = 0
        for n, start in enumerate(pieces):
            shift = [min(max(s - g, 0), t - 1) for s, g, t in zip(start, gone, taps)]
            rows = n * channels + inputs
            factor[(slice(None), rows, rows if i else inputs, *shift)] = 1
        gone = [g + t - 1 for g, t in zip(gone, taps)]

    held = factors[holder]
    held[:, : len(sums) * out] = 0
    for tap in itertools.product(*map(range, kernel.shape[2:])):
        start = tuple(max(s for s in found if s <= t) for t, found in zip(tap, starts))
        step = tuple(max(s for s in found if s <= t - a) for t, a, found in zip(tap, start, steps))
        rows = (sums.index(step) * out + outputs)[:, None]
        columns = (pieces.index(start) * channels + inputs)[None]
        place = [t - a - b for t, a, b in zip(tap, start, step)]
        held[(slice(None), rows, columns, *place)] = blocks[(slice(None), slice(None), slice(None), *tap)]

    if holder < len(factors) - 1:
        factors[-1].zero_()
        for n, step in enumerate(sums):
            factors[-1][(slice(None), outputs, n * out + outputs, *step)] = 1
    return [f.reshape(d.shape) for f, d in zip(factors, drawn)]
