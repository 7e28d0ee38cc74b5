"""`ComposedConv`: a convolution whose kernel is composed from its parameters before each use.

The rank classes of a method mix this in before ``nn.Conv1d`` ... ``nn.ConvTranspose3d``, so that
``isinstance(layer, nn.Conv2d)`` holds, ``weight`` and ``bias`` are where everybody looks for them, padding modes
come from torch, and a method writes only how the kernel is composed.

Every forward composes anew, in both modes and by differentiable operations: what a layer computes follows from its
parameters as they are, whoever wrote them. To evaluate without composing, fold, or open `composed_once`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..algebra import Kernel
from ..algebra.convolutions import CONV_TRANSPOSE, PLAIN, exchanged
from ..errors import UnsupportedError
from .foldable import Foldable, conv_arguments, describe_rank, lacks_values, layout_of, name_among_callers, plain_class
from .once import evaluated_once

FULL_PRECISION = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})
"""What kernels are composed in as they are."""


class ComposedConv(Foldable):
    """Mixin for ``nn.Conv*d`` subclasses whose kernel is a function of several parameters."""

    composed_from: tuple[str, ...] = ("weight",)
    """Names of all the layer's parameters but the bias, in the order in which `compose` takes them.

    One that is registered as None is passed as None. A layer whose parameters depend on its arguments sets this in its
    constructor.
    """

    scales_with_weight: bool = False
    """Is each output channel of the kernel linear in that channel of ``weight``, the other parameters standing?

    Who fuses a norm into a convolution replaces ``weight`` by a scaled one; elsewhere that raises, and says to fold
    first. Scaling in place (``weight.data``) cannot be seen.
    """

    ranks: ClassVar[dict[type | None, Any]] = {}
    """The rank classes of a mixin by the plain class that each stands for; they enter themselves."""

    _is_loading: bool = False

    # Declared for readers and type checkers; set by nn.Conv*d.
    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: Any
    padding: Any
    dilation: Any
    output_padding: Any
    groups: int
    in_channels: int
    out_channels: int
    transposed: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        describe_rank(cls)
        if not issubclass(cls, PLAIN):
            cls.ranks = {}
        for plain in set(cls.__bases__).intersection(PLAIN):
            cls.ranks.setdefault(plain, cls)

    def compose(self, *parameters: Tensor | None) -> Tensor:
        """The kernel, in ``weight``'s shape, from the tensors named by `composed_from`; differentiable."""
        raise NotImplementedError

    def shapes_beside(self, parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes that parameters must have, by name, so that the kernel is what the formula says.

        A tool that cuts channels off some parameters and not off others (pruning) is then told, where torch would
        broadcast. By default nothing is compared.

        Args:
            parameters: those of `composed_from` that are there.
        """
        return {}

    # ------------------------------------------------------------------ the kernel

    def kernel(self) -> Tensor:
        """The composed kernel: ``weight``'s shape and dtype, differentiable with respect to every parameter.

        Composed at each call, in float32 at least, also under autocast.
        """
        parameters = [getattr(self, name, None) for name in self.composed_from]
        for p in parameters:
            if isinstance(p, Proxy):  # torch.fx traces this layer itself
                return p.tracer.create_proxy("call_function", self._kernel_of, tuple(parameters), {})  # pyright: ignore
        return self._kernel_of(*parameters)

    def _kernel_of(self, *parameters: Tensor | None) -> Tensor:
        self._check(parameters)
        first = next(p for p in parameters if p is not None)
        dtype, is_wide = first.dtype, first.dtype in FULL_PRECISION
        for p in parameters:
            if p is not None and p.dtype is not dtype:
                is_wide = False
        if is_wide and not _is_autocast(first.device.type):
            return self.compose(*parameters)
        wide = torch.promote_types(dtype, torch.float32)
        with _without_autocast(first.device.type):
            return self.compose(*(None if p is None else p.to(wide) for p in parameters)).to(dtype)

    def checked_parameters(self) -> list[Tensor | None]:
        """What `composed_from` names.

        Raises:
            UnsupportedError: naming the layer, for shapes that do not fit each other.
        """
        found = [getattr(self, name, None) for name in self.composed_from]
        self._check(found)
        return found

    def _check(self, parameters: Sequence[Tensor | None]) -> None:
        named = {name: p for name, p in zip(self.composed_from, parameters) if p is not None}
        for name, wanted in self.shapes_beside(named).items():
            if name in named and tuple(named[name].shape) != wanted:
                beside, other = next((n, p) for n, p in named.items() if n != name)
                raise UnsupportedError(
                    f"{name_among_callers(self)}: beside {beside} of shape {tuple(other.shape)} expected {name} of "
                    f"shape {wanted}, received {tuple(named[name].shape)}; cut channels off every parameter, or fold "
                    "first"
                )

    def composition_tensors(self) -> tuple[Tensor, ...] | None:
        """For a method whose `compose` calls `foldconv.ops`: the tensors that it hands over, by which a path is picked.

        None for one that is made of torch's own products.
        """
        return None

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The layer as a `Kernel` of the algebra, composed in `dtype`."""
        parameters = self._parameters_in(dtype)
        with _without_autocast(next(p for p in parameters if p is not None).device.type):
            weight = self.compose(*parameters)
        bias = self.bias if self.bias is None or dtype is None else self.bias.to(dtype)
        return self._as_kernel(weight, bias)

    def compose_no_more(self, composed: Kernel) -> None:
        """Take what `to_kernel` gave for every later forward of this object, where those would compose the very same.

        For an object that is used once, in evaluation mode: nothing follows its parameters any more.
        """
        own = [getattr(type(self), name) for name in ("kernel", "_kernel_of", "to_kernel")]
        if own == [ComposedConv.kernel, ComposedConv._kernel_of, ComposedConv.to_kernel] and "kernel" not in vars(self):
            weight = exchanged(composed.weight, composed.groups) if composed.transposed else composed.weight
            vars(self)["kernel"] = lambda: weight

    def compose_branches(self, *parameters: Tensor | None) -> dict[str, Tensor]:
        """The terms of `compose` by the names of the branches, each in ``weight``'s shape; they add up to it.

        A method that composes a sum says here what it adds; other methods have one branch, the kernel.
        """
        return {"kernel": self.compose(*parameters)}

    def branch_kernels(self, dtype: torch.dtype = torch.float64) -> dict[str, Kernel]:
        """What `compose_branches` gives, as kernels."""
        parameters = self._parameters_in(dtype)
        with _without_autocast(next(p for p in parameters if p is not None).device.type):
            weights = self.compose_branches(*parameters)
        return {name: self._as_kernel(weight, None) for name, weight in weights.items()}

    def _parameters_in(self, dtype: torch.dtype | None) -> list[Tensor | None]:
        """What the kernel is composed from, cast to `dtype` (None: as it is)."""
        found = self.checked_parameters()
        return found if dtype is None else [None if p is None else p.to(dtype) for p in found]

    def _as_kernel(self, weight: Tensor, bias: Tensor | None) -> Kernel:
        from ..algebra.rules import _conv, _conv_transpose

        rule = _conv_transpose if self.transposed else _conv
        return rule(_Plain(self, weight, bias), self.in_channels, len(self.kernel_size))

    # ------------------------------------------------------------------ torch's side

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch does; replacing ``weight``, or adding a bias, where the kernel would not follow is refused.

        Raises:
            UnsupportedError: naming the layer. Loading, moving and sharding a layer replace nothing in this sense.
        """
        old = self._parameters.get(name)
        values = old is not None and type(old) is type(param) is nn.Parameter and not old.is_meta and param is not old
        replaced = name == "weight" and values and not self._is_loading
        added = name == "bias" and old is None and name in self._parameters and param is not None
        if (replaced or added) and not self.scales_with_weight and "_built_with" in vars(self):
            raise UnsupportedError(
                f"{name_among_callers(self)}: its kernel is not {name if replaced else 'weight'} alone, so a fused "
                f"norm or another {name} set from outside would not be what it says; fold first, or use load_state_dict"
            )
        super().register_parameter(name, param)  # pyright: ignore

    @evaluated_once
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve; arguments and shapes as in the plain layer (`output_size`: transposed convolutions only)."""
        return self._convolve(input, output_size)

    def _composed(self) -> Tensor:
        """`kernel`; methods may have a shorter way where nothing is special, for small networks."""
        return self.kernel()

    def _convolve(self, input: Tensor, output_size: list[int] | None) -> Tensor:
        if not self.transposed:
            kernel = self._composed() if type(input) is Tensor else self.kernel()
            return self._conv_forward(input, kernel, self.bias)  # pyright: ignore
        ndim = len(self.kernel_size)
        extra = self._output_padding(  # pyright: ignore
            input, output_size, self.stride, self.padding, self.kernel_size, ndim, self.dilation
        )
        return CONV_TRANSPOSE[ndim](
            input, self.kernel(), self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        vars(self)["_is_loading"] = True  # with assign=True torch replaces the parameters
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            del vars(self)["_is_loading"]
        # A plain convolution's checkpoint describes that convolution, whatever this layer had learned before.
        extras = {prefix + name for name in self.composed_from if name != "weight"}
        if prefix + "weight" in state_dict and extras.isdisjoint(state_dict):
            self.start_from(self.weight)
            lacks_values(self, prefix, [state_dict[prefix + "weight"]], args[-1])

    # ------------------------------------------------------------------ from a plain convolution

    @classmethod
    def from_conv(cls, conv: nn.Module, init: Literal["preserve", "paper"] = "preserve", **extras: Any):
        """The layer around a plain convolution's own ``weight`` and ``bias`` (the same Parameters, not copies).

        Asked of a mixin, the rank class of the convolution is made.
        The other parameters are created beside them. The layer starts from that kernel (`start_from`), or with
        ``init="paper"`` from new values (`reset_parameters`). `extras` are the method's own arguments.
        """
        weight: Tensor = conv.weight  # pyright: ignore[reportAssignmentType]
        made: Any = cls if issubclass(cls, PLAIN) else cls.ranks[plain_class(conv)]
        layer = made(**conv_arguments(conv), **extras, device="meta", dtype=weight.dtype)
        own = {"weight": weight, "bias": conv.bias}
        for name, p in list(layer.named_parameters(recurse=False)):
            empty = torch.empty(p.shape, dtype=p.dtype, device=weight.device, memory_format=layout_of(weight, p))
            setattr(layer, name, own.get(name, nn.Parameter(empty, requires_grad=weight.requires_grad)))
        if init == "paper":
            layer.reset_parameters()
        else:
            layer.start_from(weight)
        return layer.train(conv.training)

    @torch.no_grad()
    def start_from(self, kernel: Tensor) -> None:
        """Become the plain convolution with this kernel; what the extra parameters had learned is forgotten.

        A method whose kernel is not ``weight`` after ``reset_extra_parameters`` says here how to set it.

        Args:
            kernel: of the plain convolution's shape.
        """
        if kernel is not self.weight:
            self.weight.copy_(kernel)
        self.reset_extra_parameters()

    def reset_extra_parameters(self) -> None:
        """Set every parameter but ``weight`` and ``bias`` so that the kernel equals ``weight``."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialize as torch does, then the extra parameters so that the layer starts as that convolution."""
        super().reset_parameters()  # pyright: ignore
        # torch's constructor calls this before a subclass could create its own parameters.
        if all(hasattr(self, name) for name in self.composed_from):
            self.reset_extra_parameters()


class _Plain:
    """A composed layer seen as the plain convolution it computes."""

    def __init__(self, layer: ComposedConv, weight: Tensor, bias: Tensor | None):
        self._layer, self.weight, self.bias = layer, weight, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _is_autocast(device: str) -> bool:
    # The meta device has none.
    return device != "meta" and torch.is_autocast_enabled(device)


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, enabled=False) if _is_autocast(device) else contextlib.nullcontext()
