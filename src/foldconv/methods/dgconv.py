"""DGConv: Dynamic Grouping Convolution (Zhang et al., "Differentiable Learning-to-Group Channels via Groupable
Convolutional Neural Networks", ICCV 2019, arXiv 1908.05867).

A mask of zeros and ones, made of one gate per halving of the channels, learns which channels talk to each other:

    kernel        K = W ⊙ U                        U[o, i] = 1: output channel o reads input channel i
    mask          U = F_1 ⊗ F_2 ⊗ ... ⊗ F_K        F_k = g_k·1 + (1 - g_k)·I, both 2×2; K = log2 of the channels
    gate          g_k = [g̃_k ≥ 0]                  ∂g_k/∂g̃_k = 1, the straight-through estimator
    groups        2^(K - Σg)                       of equal size, for every choice of gates
    complexity    2^(K + Σg)                       the ones of U

A closed gate (g = 0) keeps the halves apart that differ in bit k of the channel's number (bit 1 is the highest), an
open one lets them mix. With all gates open this is the ordinary convolution; with all closed the depthwise one.
A gate of exactly 0 is open, so that zeros mean "nothing learned yet".

The paper defines U for in = out = 2^K. Here it stands for blocks of neighbouring channels: with 2^K the largest power
of two that divides both channel counts, and c = in / 2^K, r = out / 2^K channels to a block,

    U = (F_1 ⊗ ... ⊗ F_K) ⊗ 1_{r×c}

which is the paper's U where in = out = 2^K, and again falls into 2^(K - Σg) equal groups. A convolution that has
groups already repeats one such U, made from the channels of a group, in each of them.

Wherever the closed gates stand, this is a grouped convolution between two permutations of channels; with
``sort=True`` the closed gates' factors are moved to the front, and the groups lie side by side.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..algebra import Kernel
from ..errors import UnsupportedError
from ..layers import ComposedConv, Foldable
from ..layers.foldable import plain_class
from ..layers.permuted import realize_grouped
from ._registry import Init, Method, register

_OPEN = 0.1
"""Where gates start that are to change nothing: open, and a few steps of training away from closing."""
_UNDECIDED = 1e-8
"""Where gates start in the published code, of either sign: the first step decides."""


class _DGConvNd(ComposedConv):
    """All of DGConv, for any number of dimensions; the rank classes only pin the base.

    Args:
        sort: move the closed gates' factors to the front, so that the groups lie side by side; which gates are
            closed then no longer matters, only how many.
        complexity_weight: what `regularization` multiplies the ones of the mask by; by default there is no penalty.

    Shapes:
        input, output, ``weight`` and ``bias`` as in the plain layer; ``gates``: ``(K,)``, 2^K the largest power of two
        that divides ``in / groups`` and ``out / groups``; None when K = 0, and the layer is an ordinary convolution.

    Raises:
        UnsupportedError: for an option of another type, or a negative weight.

    Source: Zhang et al., "Differentiable Learning-to-Group Channels", ICCV 2019; the mask's equation is at the top of
    this file.
    """

    composed_from = ("weight", "gates")
    no_decay = frozenset({"gates"})
    scales_with_weight = True
    gates: Tensor | None

    def __init__(self, *args: Any, sort: bool = False, complexity_weight: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _check_options(sort, complexity_weight)
        self.sort = sort
        self.complexity_weight = float(complexity_weight)
        number = _halvings_of(self)
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.register_parameter("gates", nn.Parameter(torch.empty(number, **like)) if number else None)
        self.reset_extra_parameters()

    def reset_extra_parameters(self) -> None:
        """All gates open: the mask is all ones."""
        if self.gates is not None:
            nn.init.constant_(self.gates, _OPEN)

    def draw_gates(self) -> None:
        """Open or close each gate with equal chance, as the paper's authors start (torch's generator decides)."""
        if self.gates is not None:
            with torch.no_grad():
                signs = torch.randint(0, 2, self.gates.shape, device=self.gates.device).mul(2).sub(1)
                # In float16 that number would be zero, which is open.
                self.gates.copy_(signs * max(_UNDECIDED, torch.finfo(self.gates.dtype).tiny))

    # ------------------------------------------------------------------ the mask

    def _straight_through(self, gates: Tensor) -> Tensor:
        """Zeros and ones with the gradient of `gates`, in the order in which their factors are multiplied."""
        hard = (gates >= 0).to(gates.dtype)
        # The difference is zero, carries the gradient, and lets a NaN be seen.
        binary = hard + (gates - gates.detach())
        return binary[torch.argsort(hard, stable=True)] if self.sort else binary

    def shapes_beside(self, parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """A gate for each halving of the weight's channels."""
        out, per_group = parameters["weight"].shape[:2]
        return {"gates": (_halvings(out // self.groups, per_group),)}

    def compose(self, weight: Tensor, gates: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``W ⊙ U`` by Kronecker products: U on the blocks, multiplied onto each block's channels."""
        if gates is None:
            return weight
        eye = torch.eye(2, dtype=gates.dtype, device=gates.device)
        factors = eye + self._straight_through(gates).reshape(-1, 1, 1) * (1 - eye)
        mask = factors[0]
        for factor in factors[1:]:
            mask = torch.kron(mask, factor)
        blocks = mask.shape[0]
        out, per_group = weight.shape[0] // self.groups, weight.shape[1]
        split = weight.reshape(self.groups, blocks, out // blocks, blocks, per_group // blocks, *weight.shape[2:])
        ones = (1,) * (weight.dim() - 2)
        return (split * mask.reshape(1, blocks, 1, blocks, 1, *ones)).reshape(weight.shape)

    def mask(self) -> Tensor:
        """U: zeros and ones, shape ``(out, in / groups)``, without gradient.

        Example:
            >>> layer = DGConv2d(4, 4, 1)
            >>> _ = layer.gates.data.copy_(torch.tensor([1.0, -1.0]))
            >>> layer.mask()
            tensor([[1., 0., 1., 0.],
                    [0., 1., 0., 1.],
                    [1., 0., 1., 0.],
                    [0., 1., 0., 1.]])
        """
        with torch.no_grad():
            return self._by_bits(self.gates)

    def _by_bits(self, gates: Tensor | None) -> Tensor:
        """U by what it says, without Kronecker products: a factor g_k wherever the channels differ in bit k."""
        out, per_group = self.weight.shape[0] // self.groups, self.weight.shape[1]
        number = 0 if gates is None else len(gates)
        device = self.weight.device
        rows = torch.arange(out, device=device) // (out >> number)
        columns = torch.arange(per_group, device=device) // (per_group >> number)
        differ = rows.reshape(-1, 1) ^ columns
        mask = torch.ones(out, per_group, dtype=self.weight.dtype, device=device)
        if gates is not None:
            for k, gate in enumerate(self._straight_through(gates)):
                mask = torch.where(differ >> (number - 1 - k) & 1 == 1, mask * gate, mask)
        return mask.repeat(self.groups, 1)

    def feature_forward(self, input: Tensor) -> Tensor:
        """Convolve with the weight of every pair of channels times that pair's gates."""
        self.checked_parameters()
        mask = self._by_bits(self.gates).reshape(*self.weight.shape[:2], *(1,) * len(self.kernel_size))
        return self._conv_forward(input, self.weight * mask, self.bias)  # pyright: ignore

    # ------------------------------------------------------------------ what it costs

    def complexity(self) -> Tensor:
        """The ones of U, a scalar with the gates' straight-through gradient: the paper's ``2^(K + Σg)``.

        Multiplied by the taps and the positions of the output these are the multiply-adds of the folded layer.

        Example:
            >>> DGConv2d(8, 8, 3).complexity()
            tensor(64., grad_fn=<MulBackward0>)
        """
        dense = math.prod(self.weight.shape[:2])
        if self.gates is None:
            return torch.tensor(float(dense), device=self.weight.device)
        gates = self.gates.to(torch.promote_types(self.gates.dtype, torch.float32))
        return 2.0 ** (self._straight_through(gates).sum() - len(gates)) * dense

    def measures(self) -> dict[str, Any]:
        """``groups``: those of the folded layer, the convolution's own included; ``gates``: their values."""
        gates = [] if self.gates is None else self.gates.detach().tolist()
        return {"groups": self.groups * 2 ** sum(gate < 0 for gate in gates), "gates": gates}

    def composition_cost(self) -> int:
        """Multiply-adds of composing: one per entry of the kernel, and those of the Kronecker products."""
        number = _halvings_of(self)
        return self.weight.numel() + sum(4**k for k in range(2, number + 1)) if number else 0

    # ------------------------------------------------------------------ the fold

    def realize(self, kernel: Kernel) -> nn.Module:
        """A convolution of ``2^(K - Σg)`` groups; one between permutations where they do not lie side by side.

        Tensors without values (the meta device) fold as if all gates were open.
        """
        gates = [1.0] if self.gates is None or self.gates.is_meta else self.gates.detach().tolist()
        opened = [gate >= 0 for gate in gates]
        if all(opened):
            return super().realize(kernel)
        if self.sort:
            opened.sort()
        groups, blocks = 2 ** opened.count(False), range(2 ** len(opened))
        # Blocks that agree in every bit whose gate is closed are a group.
        kept = sum((not gate) << bit for bit, gate in enumerate(reversed(opened)))
        order = sorted(blocks, key=lambda block: block & kept)
        return realize_grouped(
            self,
            kernel,
            self.groups * groups,
            input_order=_channels(order, self.in_channels // self.groups, self.groups),
            output_order=_channels(order, self.out_channels // self.groups, self.groups),
        )

    @property
    def method(self) -> DGConv:
        """The config that rebuilds this layer."""
        return DGConv(self.sort, self.complexity_weight)

    def extra_repr(self) -> str:
        """torch's description and the method's options."""
        options = ", sort=True" if self.sort else ""
        if self.complexity_weight:
            options += f", complexity_weight={self.complexity_weight}"
        return super().extra_repr() + options


def _halvings_of(conv: Any) -> int:
    return _halvings(conv.in_channels // conv.groups, conv.out_channels // conv.groups)


def _halvings(inputs: int, outputs: int) -> int:
    """K: how often both channel counts of a group can be halved."""
    common = math.gcd(inputs, outputs)
    return (common & -common).bit_length() - 1


def _channels(order: list[int], channels: int, groups: int) -> list[int]:
    """The channels of the blocks in this order, in each of the convolution's own groups."""
    size = channels // len(order)
    return [group * channels + block * size + i for group in range(groups) for block in order for i in range(size)]


def _check_options(sort: Any, complexity_weight: Any) -> None:
    if not isinstance(sort, bool):
        raise UnsupportedError(f"sort: expected True or False, received {sort!r}")
    number = isinstance(complexity_weight, (int, float)) and not isinstance(complexity_weight, bool)
    if not number or not 0 <= complexity_weight < math.inf:
        raise UnsupportedError(f"complexity_weight: expected a number ≥ 0, received {complexity_weight!r}")


class DGConv1d(_DGConvNd, nn.Conv1d):
    """``nn.Conv1d`` that learns its groups."""


class DGConv2d(_DGConvNd, nn.Conv2d):
    """``nn.Conv2d`` that learns its groups.

    Example:
        >>> layer = DGConv2d(4, 8, 3, padding=1, sort=True)
        >>> _ = layer.gates.data.copy_(torch.tensor([0.3, -0.2]))
        >>> plain = layer.fold()
        >>> plain
        Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2)
        >>> x = torch.randn(1, 4, 6, 6)
        >>> torch.allclose(layer(x), plain(x), atol=1e-6)
        True
    """


class DGConv3d(_DGConvNd, nn.Conv3d):
    """``nn.Conv3d`` that learns its groups."""


@register
@dataclasses.dataclass(frozen=True)
class DGConv(Method):
    """DGConv for `expand`.

    Args:
        sort: keep the groups side by side.
        complexity_weight: the weight of each layer's complexity in `foldconv.regularization`; with 0 there is no
            penalty, as in the published results.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> foldconv.expand(net, foldconv.DGConv(sort=True))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): DGConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), sort=True)
        )
    """

    sort: bool = False
    complexity_weight: float = 0.0

    name: ClassVar[str] = "dgconv"
    title: ClassVar[str] = "DGConv"
    paper: ClassVar[str] = "Zhang et al., ICCV 2019, arXiv 1908.05867"
    adds: ClassVar[str] = "a mask that learns the groups; folds to a grouped convolution"
    gain: ClassVar[str] = "ImageNet top-1, ResNeXt-50: 78.20 → 78.59"
    kind: ClassVar[Literal["composable", "statistical"]] = "composable"
    changes_groups: ClassVar[bool] = True

    def reason_against(self, conv: nn.Module, norm: nn.Module | None = None) -> str | None:
        """Transposed convolutions, and channel counts that no power of two divides."""
        plain: Any = conv
        if plain_class(conv) not in _DGConvNd.ranks:
            return f"the paper's mask is for convolutions, and {type(conv).__name__} is a transposed one"
        if _halvings_of(conv) == 0:
            which = "" if plain.groups == 1 else f" in each of its {plain.groups} groups"
            return (
                f"it has {plain.in_channels // plain.groups} input and {plain.out_channels // plain.groups} output "
                f"channels{which}, which two does not divide both, so there is nothing to group"
            )
        return None

    def expand(self, conv: nn.Module, init: Init = "preserve", norm: nn.Module | None = None) -> Foldable:
        """The DGConv around `conv`'s own weight, all gates open; ``init="paper"`` draws the weight and the gates."""
        reason = self.reason_against(conv)
        if reason is not None:
            raise UnsupportedError(f"{type(conv).__name__} cannot become dgconv: {reason}")
        layer = _DGConvNd.from_conv(conv, **dataclasses.asdict(self))
        if init == "paper":
            layer.reset_parameters()
            layer.draw_gates()
        return layer

    def penalty(self, layer: Any) -> Tensor | None:
        """``complexity_weight`` times the layer's `complexity`; None without gates or weight."""
        return (
            None if layer.gates is None or not self.complexity_weight else self.complexity_weight * layer.complexity()
        )


def complexity(model: nn.Module) -> Tensor:
    """ζ of the paper: the ones of all masks of a model, a scalar with gradients for the gates.

    Raises:
        UnsupportedError: when the model has no DGConv layer.

    Example:
        >>> import foldconv
        >>> complexity(foldconv.expand(nn.Conv2d(4, 4, 3), "dgconv")).item()
        16.0
    """
    layers = [module for module in model.modules() if isinstance(module, _DGConvNd)]
    if not layers:
        raise UnsupportedError(f"{type(model).__name__} has no DGConv layer; expand it with 'dgconv' first")
    return torch.stack([layer.complexity() for layer in layers]).sum()


def budget_objective(loss: Tensor, model: nn.Module, budget: float | None = None, exponent: float = -0.02) -> Tensor:
    """The paper's objective for training within a budget: ``L · (o / ζ)^a``.

    ``ζ`` is the model's `complexity` and ``o`` the budget; ``a`` is 0 while ζ ≤ o, so that only what exceeds the
    budget costs something, and `exponent` beyond.

    Args:
        loss: L, a scalar.
        model: a model with DGConv layers.
        budget: o, in ones of the masks; None: an average of 32 groups per layer, ``Σ in·out/groups / 32``.
        exponent: a beyond the budget, at most 0.

    Returns:
        A scalar, to minimize in the place of `loss`.

    Raises:
        UnsupportedError: for a budget that is not positive, a positive exponent, or a model without DGConv layers.

    Example:
        >>> import foldconv
        >>> net = foldconv.expand(nn.Conv2d(32, 32, 3), "dgconv")    # ζ = 32², the budget is 32: 2^(-0.02 · -5)
        >>> round(budget_objective(torch.tensor(1.0), net).item(), 4)
        1.0718
    """
    cost = complexity(model)
    if budget is None:
        dense = sum(math.prod(m.weight.shape[:2]) for m in model.modules() if isinstance(m, _DGConvNd))
        budget = dense / 32
    if not 0 < budget < math.inf or not exponent <= 0:
        raise UnsupportedError(
            f"expected a positive budget and an exponent of at most 0, received {budget!r} and {exponent!r}"
        )
    return loss * (cost / budget).clamp(min=1) ** -exponent
