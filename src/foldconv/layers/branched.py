"""`BranchedConv`: a convolution and its norm, trained as parallel branches with norms of their own.

The norm inside a branch uses the batch while training, so the branches run on feature maps; only the evaluation
function is linear, and that is what folds. The branches are ordinary modules in a tree of `Sum` and
``nn.Sequential``; `kernel_of` folds the tree, so a method says only which branches there are.

The norm that followed the convolution moves into the main branch. `NormPlace` keeps its place in the network, so
that folding can put a norm back and the folded network has the keys of the original.

The branches run in both modes. To evaluate as one convolution, fold, or open `composed_once`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Kernel, kernel_of, kernel_rule
from ..algebra.norms import scale_and_shift
from .foldable import Foldable, realize_like
from .once import evaluated_once
from .terms import terms_of


class BranchTree(Foldable):
    """A layer that is a tree of modules, its ``body``, which it runs."""

    body: nn.Module

    @evaluated_once
    def forward(self, input: Tensor) -> Tensor:
        """The body's function of `input`; shapes as in the convolution."""
        return self.body(input)

    def feature_forward(self, input: Tensor) -> Tensor:
        """Run the body."""
        return self.body(input)

    def branch_kernels(self, dtype: torch.dtype = torch.float64) -> dict[str, Kernel]:
        """The branches of the body (`terms_of`)."""
        return terms_of(self.body, self.to_kernel(dtype))


class BranchedConv(BranchTree):
    """A tree of branches in the place of a convolution.

    Args:
        body: the branches, a tree that `kernel_of` understands.
        conv: the convolution of the main branch, itself in `body`; the fold takes its arguments and layout.
        method: the config that built the body.

    Raises:
        UnsupportedError: from `fold`, when the tree has no exact kernel.
    """

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

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The evaluation-mode kernel, in the main convolution's window."""
        return kernel_of(self.body, in_channels=self.conv.in_channels, ndim=len(self.conv.kernel_size), dtype=dtype)

    def realize(self, kernel: Kernel) -> nn.Module:
        """A plain convolution like the main branch's; of the kernel's own window, if somebody enlarged the body."""
        source = self.conv if kernel.weight.shape == self.conv.weight.shape else self
        return realize_like(source, kernel).train(self.training)


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
        # Other people's fusers may have taken it away.
        like = getattr(layer.norm, "running_var", None)
        like = layer.conv.weight if like is None else like
        norm = norm.to(like.device, like.dtype)
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


@kernel_rule(NormPlace)
def _place(place: NormPlace, channels: int, ndim: int) -> Kernel:
    return kernel_of(place.rest, in_channels=channels, ndim=ndim)
