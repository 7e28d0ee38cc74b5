"""The few modules that torch lacks for writing a block as a tree: `Sum` and `Scale`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """Parallel branches, added: ``y = Σ_b branch_b(x)``.

    Args:
        *branches: modules that take one input and give outputs of one shape; numbered like those of ``nn.Sequential``.
        **named: further branches, under names of their own.

    Example:
        >>> block = Sum(nn.Conv2d(4, 4, 3, padding=1), point=nn.Conv2d(4, 4, 1), identity=nn.Identity())
        >>> block(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 4, 5, 5])
        >>> [name for name, branch in block.named_children()]
        ['0', 'point', 'identity']
    """

    def __init__(self, *branches: nn.Module, **named: nn.Module):
        super().__init__()
        for name, branch in {**{str(i): b for i, b in enumerate(branches)}, **named}.items():
            self.add_module(name, branch)

    def forward(self, input: Tensor) -> Tensor:
        """Run every branch on `input` and add."""
        first, *rest = self.children()
        output = first(input)
        for branch in rest:
            output = output + branch(input)
        return output


class Scale(nn.Module):
    """A learned factor per channel: ``y[:, c] = weight[c] · x[:, c]``.

    Args:
        channels: channels of the input, its dimension 1.
        value: initial factor.

    Example:
        >>> Scale(2, value=0.5)(torch.ones(1, 2, 1)).flatten().tolist()
        [0.5, 0.5]
    """

    def __init__(self, channels: int, value: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(value)))

    def forward(self, input: Tensor) -> Tensor:
        """Scale `input` of shape ``(batch, channels, *spatial)``."""
        return input * self.weight.reshape(-1, *(1,) * (input.dim() - 2))

    def extra_repr(self) -> str:
        """Show the channel count."""
        return str(self.weight.numel())
