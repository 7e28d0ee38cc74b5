"""Convolutions that a runtime gets wrong or refuses, written as other modules of exactly the same function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.convolutions import PLAIN, taps_of, written_padding
from ..layers.foldable import conv_arguments, plain_class
from ..layers.permuted import PERMUTED
from ..network.tree import replace_modules
from .formats import Format


def _rank(conv: Any) -> int:
    return len(conv.kernel_size)


def _turned(conv: Any) -> bool:
    return conv.transposed


KINDS: dict[str, Callable[[Any], bool]] = {
    "circular padding": lambda conv: conv.padding_mode == "circular",
    "permuted channels": lambda conv: isinstance(conv, tuple(PERMUTED.values())),
    "three dimensions": lambda conv: _rank(conv) == 3,
    "groups in three dimensions": lambda conv: _rank(conv) == 3 and conv.groups > 1,
    "transposed in three dimensions": lambda conv: _rank(conv) == 3 and _turned(conv),
    "transposed with padding": lambda conv: _turned(conv) and any(conv.padding),
    "transposed with output_padding": lambda conv: _turned(conv) and any(conv.output_padding),
    "transposed with dilation": lambda conv: _turned(conv) and any(d > 1 for d in conv.dilation),
}
"""The kinds of convolution that some runtime does not take as they are."""
_PRELU = "PReLU of other than four dimensions"


def convolutions(network: nn.Module) -> dict[str, Any]:
    """The ordinary convolutions of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, PLAIN)}


def kinds_of(conv: nn.Module, form: Format) -> list[str]:
    """Those of the kinds that a format does not take as they are, which a convolution is of.

    Example:
        >>> form = Format("of an example", ".net", "example.py", None, refused={"three dimensions": "fails"})
        >>> kinds_of(nn.Conv3d(1, 1, 1), form), kinds_of(nn.Conv2d(1, 1, 1), form)
        (['three dimensions'], [])
    """
    return [kind for kind in (*form.rewritten, *form.refused) if kind in KINDS and KINDS[kind](conv)]


class WrappedPad(nn.Module):
    """Circular padding as a concatenation of slices, which every runtime knows.

    Args:
        padding: before and after, per spatial dimension.

    Shapes:
        input ``(..., *spatial)``; output with each spatial size larger by its padding.

    Example:
        >>> WrappedPad([(1, 2)])(torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[3., 1., 2., 3., 1., 2.]]])
    """

    def __init__(self, padding: Sequence[tuple[int, int]]):
        super().__init__()
        self.padding = list(padding)

    def forward(self, input: Tensor) -> Tensor:
        """Pad one dimension after the other."""
        # By indexing, not by narrow(), which ncnn's converter writes down as it stands and ncnn then does not know.
        for dim, (before, after) in zip(range(-len(self.padding), 0), self.padding):
            behind = (slice(None),) * (-1 - dim)
            parts = [input[(..., slice(-before, None), *behind)]] if before else []
            parts += [input, *([input[(..., slice(after), *behind)]] if after else [])]
            input = torch.cat(parts, dim)
        return input

    def extra_repr(self) -> str:
        """The padding."""
        return f"{self.padding}"


class AnyPReLU(nn.Module):
    """PReLU of the same parameters, of a tensor without four dimensions by ReLU alone: max(x, 0) - a · max(-x, 0).

    Example:
        >>> AnyPReLU(nn.PReLU(init=0.5))(torch.tensor([[2.0, -2.0]]))
        tensor([[ 2., -1.]], grad_fn=<SubBackward0>)
    """

    def __init__(self, prelu: nn.PReLU):
        super().__init__()
        self.weight = prelu.weight

    def forward(self, input: Tensor) -> Tensor:
        """Of the input's shape; channels are the second dimension."""
        if input.dim() == 4:
            return nn.functional.prelu(input, self.weight)
        slope = self.weight.view(-1, *(1,) * (input.dim() - 2))
        return input.relu() - slope * (-input).relu()


def portable(network: nn.Module, form: Format) -> nn.Module:
    """The network itself, with what `form` lists as rewritten in other words; the function stays the same.

    Example:
        >>> form = Format("of an example", ".net", "example.py", None, rewritten=("circular padding",))
        >>> conv = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
        >>> portable(nn.Sequential(conv), form)
        Sequential(
          (0): Sequential(
            (0): WrappedPad([(1, 1)])
            (1): Conv1d(2, 2, kernel_size=(3,), stride=(1,))
          )
        )
    """
    found = {conv: _rewritten(conv, form) for conv in convolutions(network).values()}
    if _PRELU in form.rewritten:
        found |= {module: AnyPReLU(module) for module in network.modules() if type(module) is nn.PReLU}
    return replace_modules(network, {conv: new for conv, new in found.items() if new is not None})


def _rewritten(conv: Any, form: Format) -> nn.Module | None:
    kinds = [kind for kind in kinds_of(conv, form) if kind in form.rewritten]
    if not kinds:
        return None
    before: list[nn.Module] = []
    behind: list[nn.Module] = []
    if "permuted channels" in kinds:
        before += _permutation(conv, conv.input_order)
        behind += _permutation(conv, conv.output_order)
    arguments = conv_arguments(conv) | {"bias": conv.bias is not None}
    if "circular padding" in kinds:
        before.append(WrappedPad(written_padding(conv)))
        arguments |= {"padding": 0, "padding_mode": "zeros"}
    weight = conv.weight
    if "transposed with dilation" in kinds:
        weight = _spread(weight, [(n - 1) * d + 1 for n, d in zip(taps_of(conv), conv.dilation)], conv.dilation)
        arguments |= {"dilation": 1}
    if "transposed with output_padding" in kinds:  # of it, taps of zero make room at the far end
        weight = _spread(weight, [n + more for n, more in zip(weight.shape[2:], conv.output_padding)])
        arguments |= {"output_padding": 0}
    if "transposed with padding" in kinds:  # which takes away at the ends
        behind.insert(0, _Cropped(conv.padding))
        arguments |= {"padding": 0}
    cls: Any = plain_class(conv)
    cls = next((plain for plain, permuted in PERMUTED.items() if isinstance(conv, permuted)), cls)
    plain = cls(**arguments | {"kernel_size": tuple(weight.shape[2:])}, device="meta")
    plain.weight = weight if weight is conv.weight else nn.Parameter(weight, requires_grad=False)
    plain.bias = conv.bias
    if "groups in three dimensions" in kinds:
        plain = _Groups(plain)
    return nn.Sequential(*before, plain, *behind).eval() if before or behind else plain.eval()


def _spread(weight: Tensor, size: Sequence[int], step: Sequence[int] | None = None) -> Tensor:
    """A kernel of that size with the taps of another, so many apart, and zeros."""
    spread = weight.new_zeros(*weight.shape[:2], *size)
    ends = [(n - 1) * d + 1 for n, d in zip(weight.shape[2:], step or (1,) * len(size))]
    spread[(..., *(slice(0, end, d) for end, d in zip(ends, step or (1,) * len(size))))] = weight.detach()
    return spread


class _Cropped(nn.Module):
    """So many elements less at both ends of each spatial dimension."""

    def __init__(self, ends: Sequence[int]):
        super().__init__()
        self.ends = list(ends)

    def forward(self, input: Tensor) -> Tensor:
        """By slices."""
        return input[(..., *(slice(n, -n or None) for n in self.ends))]


class _Groups(nn.Module):
    """A grouped convolution as one for each group, beside each other."""

    def __init__(self, conv: Any):
        super().__init__()
        arguments = conv_arguments(conv) | {"groups": 1, "device": "meta"}
        for end in ("in_channels", "out_channels"):
            arguments[end] //= conv.groups
        biases = (None,) * conv.groups if conv.bias is None else conv.bias.detach().chunk(conv.groups)
        self.convs = nn.ModuleList()
        for weight, bias in zip(conv.weight.detach().chunk(conv.groups), biases):
            part = type(conv)(**arguments)
            part.weight = nn.Parameter(weight, requires_grad=False)
            part.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            self.convs.append(part)

    def forward(self, input: Tensor) -> Tensor:
        """Along the channels: apart, and together again."""
        parts = input.chunk(len(self.convs), 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts)], 1)


def _permutation(conv: Any, order: Tensor | None) -> list[nn.Module]:
    """A gather of channels as a convolution of one tap, which is one for the channel that is taken."""
    if order is None:
        return []
    rank = len(taps_of(conv))
    cls = next(plain for plain, permuted in PERMUTED.items() if isinstance(conv, permuted))
    gather = cls(len(order), len(order), 1, bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
    ones = torch.eye(len(order), device=conv.weight.device, dtype=conv.weight.dtype)[order]
    gather.weight = nn.Parameter(ones.reshape(*ones.shape, *(1,) * rank), requires_grad=False)
    return [gather]
