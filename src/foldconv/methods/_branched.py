"""`BranchedMethod`: what statistical methods have in common. A method says which branches stand beside the main one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from torch import nn

from ..algebra import Sum
from ..algebra.norms import is_norm, norm_only
from ..layers import BranchedConv
from ..layers.branched import branch_conv, has_identity, norm_like
from ..layers.foldable import conv_arguments
from ._registry import Init, Method


@dataclasses.dataclass(frozen=True)
class BranchedMethod(Method):
    """Base of methods that run branches with norms while training.

    The main branch is the convolution itself, with the norm that followed it if there was one. The others are new.
    With ``init="preserve"`` the last norm of each starts with zero weight: it adds nothing, and learns at once.
    """

    takes_norm: ClassVar[bool] = True
    kind: ClassVar[Literal["composable", "statistical"]] = "statistical"

    def branches(self, conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
        """The branches beside the main one, by name, built to stand beside `conv`."""
        raise NotImplementedError

    def body(self, main: nn.Sequential, conv: Any, norm: nn.Module | None) -> nn.Module:
        """The whole tree; by default the sum of the main branch and the others."""
        return Sum(main=main, **self.branches(conv, norm))

    def main_conv(self, conv: Any) -> Any:
        """The convolution of the main branch, with `conv`'s parameters.

        A convolution of its own: hooks on the old one move to the layer and must not fire twice.
        """
        own = type(conv)(**conv_arguments(conv), device="meta")
        own.weight, own.bias = conv.weight, conv.bias
        return own.train(conv.training)

    def silence(self, layer: BranchedConv) -> None:
        """Change the new branches so that they add nothing yet and the layer computes what `main` does."""
        for name, branch in layer.body.named_children():
            if name != "main":
                *_, last = (module for module in branch.modules() if is_norm(module))
                nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]

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
        layer = BranchedConv(self.body(main, own, norm), own, self)
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


def conv_norm(conv: Any, norm: nn.Module | None, kernel_size: Any, **changes: Any) -> nn.Sequential:
    """A branch of a convolution without bias and a norm, its window in the middle of `conv`'s."""
    branch = branch_conv(conv, kernel_size, **changes)
    branch.add_module("norm", norm_like(norm, conv))
    return branch


def identity_norm(conv: Any, norm: nn.Module | None) -> dict[str, nn.Module]:
    """The identity branch with its norm, where there is one."""
    return {"identity": nn.Sequential(norm_like(norm, conv))} if has_identity(conv) else {}
