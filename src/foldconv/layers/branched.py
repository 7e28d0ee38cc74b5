"""`BranchedConv`: a convolution and its norm, trained as parallel branches with norms of their own.

The norm inside a branch uses the batch while training, so the branches run on feature maps; only the evaluation
function is linear, and that is what folds. The branches are ordinary modules in a tree of `Sum` and
``nn.Sequential``; `kernel_of` folds the tree, so a method says only which branches there are.

The norm that followed the convolution moves into the main branch. `NormPlace` keeps its place in the network, so
that folding can put a norm back and the folded network has the keys of the original.

The branches run in both modes. To evaluate as one convolution, fold, or open `composed_once`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Kernel, kernel_of
from ..errors import UnsupportedError
from .borrowed import Borrowed
from .foldable import Foldable, lacks_values, name_among_callers, realize_like
from .handover import Handover
from .once import evaluated_once
from .terms import terms_of

_OF_THE_CONV = (
    *("weight", "bias", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("padding_mode", "transposed", "output_padding"),
)


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


def runs_its_features(layer: nn.Module) -> bool:
    """Does calling a layer run what its `feature_forward` runs, and nothing else?"""
    methods = type(layer).forward, type(layer).feature_forward  # pyright: ignore[reportAttributeAccessIssue]
    return methods in [(cls.forward, BranchTree.feature_forward) for cls in (BranchTree, BranchedConv)]


class BranchedConv(Borrowed, BranchTree):
    """A tree of branches in the place of a convolution.

    Args:
        body: the branches, a tree that `kernel_of` understands.
        conv: the convolution of the main branch, itself in `body`; the fold takes its arguments and layout.
        method: the config that built the body.
        norm: the network's own norm that was taken in, itself in `body`; None: there was none.

    ``weight``, ``bias`` and the other attributes of a convolution are those of `conv`, to be read; ``weight`` is the
    main branch's own Parameter, so what initializers write into it is learned by that branch.

    A state dict of the plain convolution (``weight`` and perhaps ``bias``) makes the layer that convolution: the other
    branches add nothing then, whatever they had learned. The norm's keys are loaded by its `NormPlace`.

    Raises:
        UnsupportedError: from `fold`, when the tree has no exact kernel; when one of the convolution's attributes is
            set.
    """

    held_in = ("convolution", "conv")

    def __init__(self, body: nn.Module, conv: nn.Module, method: Any, norm: nn.Module | None = None):
        super().__init__()
        self.body = body
        paths = {module: name for name, module in body.named_modules()}
        self._path = paths[conv]
        self._norm_path = None if norm is None else paths[norm]
        self._method = method
        self.handover: Handover | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The sum of the branches; shapes as in the convolution, without a batch as of a batch of one."""
        if isinstance(input, Tensor) and input.dim() == len(self.conv.kernel_size) + 1:
            output = super().forward(input.unsqueeze(0)).squeeze(0)
        else:
            output = super().forward(input)
        return output if self.handover is None else self.handover.give(self, output)

    forward.is_evaluated_once = True  # pyright: ignore[reportFunctionMemberAccess]  # its super is

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

    @property
    def own_norm(self) -> Any:
        """The network's norm that was taken in, or None."""
        return None if self._norm_path is None else self.body.get_submodule(self._norm_path)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As of any module; those of its norms are left to the `NormPlace`, if there is one.

        So each child of a network has what it had in the plain one, for who groups or freezes parameters by children.
        ``named_parameters`` names them all.
        """
        place = None if self.handover is None or not recurse else self.handover.place()
        theirs = set() if place is None else {id(p) for norm in place.norms() for p in norm.parameters()}
        return (parameter for parameter in super().parameters(recurse) if id(parameter) not in theirs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.conv, name) if name in _OF_THE_CONV else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_THE_CONV:
            raise UnsupportedError(
                f"{name_among_callers(self)}: its branches were built for one {name}, which cannot be set; fold first, "
                f"or set it before expanding"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, metadata: dict, *args: Any) -> None:
        plain = {key: state_dict[key] for name in ("weight", "bias") if (key := prefix + name) in state_dict}
        if prefix + "weight" in plain and not any(key.startswith(prefix + "body.") for key in state_dict):
            # torch goes on to the branches: they find the values that they have, and no key is missing.
            values = {key: value.clone() for key, value in plain.items()}
            strict, missing, *lists = args
            self.conv._load_from_state_dict(values, prefix, metadata, strict, absent := [], *lists)
            missing += [key for key in absent if key in (prefix + "weight", prefix + "bias")]
            lacks_values(self, prefix, plain.values(), lists[-1])
            with torch.no_grad():
                self._method.silence(self)
            for key in plain:
                del state_dict[key]
            state_dict.update(self.body.state_dict(prefix=prefix + "body."))
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The evaluation-mode kernel, in the main convolution's window."""
        return kernel_of(self.body, in_channels=self.conv.in_channels, ndim=len(self.conv.kernel_size), dtype=dtype)

    def realize(self, kernel: Kernel) -> nn.Module:
        """A plain convolution like the main branch's; of the kernel's own window, if somebody enlarged the body."""
        source = self.conv if kernel.weight.shape == self.conv.weight.shape else self
        return realize_like(source, kernel).train(self.training)
