"""`FoldableBlock`: a user's own tree of ordinary modules, folded like any method's layer."""

from __future__ import annotations

import torch
from torch import nn

from .._arguments import expect
from ..algebra import Kernel, kernel_of
from ..errors import UnsupportedError
from .branched import BranchTree


class FoldableBlock(BranchTree):
    """A block of standard linear modules that `fold` turns into one convolution; nothing has to be registered.

    Args:
        body: a tree of convolutions, norms, poolings, ``nn.Sequential``, ``foldconv.algebra.Sum`` and ``Scale``, with
            parameters: whatever `kernel_of` understands.
        in_channels, ndim: channels and spatial dimensions of the input, where the body does not tell.

    Raises:
        UnsupportedError: at once, when the body has no exact kernel; the message names the part.

    Example:
        >>> import foldconv
        >>> from foldconv.algebra import Sum
        >>> block = foldconv.FoldableBlock(
        ...     Sum(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)), nn.Conv2d(4, 8, 1))
        ... )
        >>> foldconv.fold(nn.Sequential(block, nn.ReLU()))
        Sequential(
          (0): Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
          (1): ReLU()
        )
    """

    def __init__(self, body: nn.Module, *, in_channels: int | None = None, ndim: int | None = None):
        super().__init__()
        expect("body", body, nn.Module, "a torch.nn.Module")
        self.body = body
        self.in_channels, self.ndim = in_channels, ndim
        if next(body.parameters(), None) is None:
            raise UnsupportedError(f"{type(body).__name__}: expected a body with parameters; there is nothing to fold")
        with torch.no_grad():
            # Only to refuse now, with the name of the part, what could not be folded later.
            self.to_kernel()

    @property
    def method(self) -> None:
        """None: the block is part of the plain network, no method expanded it."""
        return None

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The body's evaluation-mode kernel."""
        return kernel_of(self.body, in_channels=self.in_channels, ndim=self.ndim, dtype=dtype)

    def realize(self, kernel: Kernel) -> nn.Module:
        """The plain convolution, in the window that the kernel needs and the body's dtype."""
        dtype = next(self.body.parameters()).dtype
        plain = kernel.to_module().to(dtype)
        plain.requires_grad_(any(p.requires_grad for p in self.body.parameters()))
        return plain.train(self.training)
