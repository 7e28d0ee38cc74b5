"""`Foldable`: a layer that trains with more than it needs and folds into one plain convolution."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as torch_module

from ..algebra import Kernel
from ..algebra.convolutions import PLAIN, arguments_in_use, exchanged, undrawn
from ..algebra.rules import conv_geometry, transposed_geometry


class Foldable(nn.Module):
    """Base of all foldable layers; a subclass says what kernel it computes, the rest follows."""

    no_decay: ClassVar[frozenset[str]] = frozenset()
    """Names of the layer's own parameters that weight decay must leave alone (gates, scales).

    Biases, norms and whatever has one dimension are left alone anyway.
    """

    _built_with: frozenset[str] = frozenset()
    """Names of the attributes that the layer was built with, which its fold does not get; see `note_attributes`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _noting(cls.__init__)

    def note_attributes(self) -> None:
        """All attributes that the layer has now are its own; what is attached later is the user's and is carried over.

        Called when a constructor ends and when a method's `expand` returns; an author has nothing to list.
        """
        vars(self)["_built_with"] = frozenset(vars(self)) | {"_built_with"}

    @property
    def method(self) -> Any:
        """The method's config that rebuilds this layer from a plain convolution; None for a layer of no method."""
        raise NotImplementedError

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The kernel of the evaluation-mode function, computed in `dtype` (None: the parameters' own)."""
        raise NotImplementedError

    def branch_kernels(self, dtype: torch.dtype = torch.float64) -> dict[str, Kernel]:
        """The parallel branches by name: kernels without bias whose weights add up to that of `to_kernel`, tap by tap.

        A layer without branches beside each other is one, named ``kernel``.
        """
        return {"kernel": self.to_kernel(dtype).replace(bias=None)}

    def measures(self) -> dict[str, Any]:
        """What else the method's authors look at while training: numbers and lists of numbers, by any names.

        `foldconv.branches` shows them; None stands for a number that is not there.
        """
        return {}

    def feature_forward(self, input: Tensor) -> Tensor:
        """The same function evaluated on feature maps, independently of `to_kernel`: what a fold is checked against."""
        return self(input)

    def regularization(self) -> Tensor | None:
        """The method's `penalty` for this layer: a scalar, or None."""
        method = self.method
        return None if method is None else method.penalty(self)

    def composition_cost(self) -> int:
        """Multiply-adds spent on composing the kernel once, independent of the input."""
        return 0

    def realize(self, kernel: Kernel) -> nn.Module:
        """The plain convolution that takes this layer's place and computes `kernel`, cast to the layer's dtype."""
        return realize_like(self, kernel)

    def fold(self) -> nn.Module:
        """The plain convolution with this layer's evaluation-mode function, composed in float64, cast last."""
        return self.realize(self.to_kernel())

    def fuse(self) -> nn.Module:
        """`fold`, by the name that timm's ``reparameterize_model`` looks for."""
        return self.fold()


def _noting(build: Callable[..., None]) -> Callable[..., None]:
    """A constructor that ends by noting the attributes; where several are nested, the outermost ends last."""

    @functools.wraps(build)
    def __init__(self: Foldable, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.note_attributes()

    return __init__


def as_a_call(layer: nn.Module, input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For a tracer of torch.fx, the node that calls the layer; None where there is no tracer, or it traces the layer.

    torch's tracers look into every module that is not torch's own, and a kernel is composed by more than they follow.
    """
    if not issubclass(type(input), Proxy) or getattr(input.tracer, "root", layer) is layer:
        return None
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(layer), (input, *args), kwargs)


def name_among_callers(module: nn.Module, otherwise: nn.Module | None = None) -> str:
    """For a message: the module's name in the outermost module whose code is running, and its class.

    Where none is running the name is that in the module `otherwise`.
    """
    name = "" if otherwise is None else next((path for path, m in otherwise.named_modules() if m is module), "")
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            name = next((path for path, child in caller.named_modules() if child is module), name)
        frame = frame.f_back
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def lacks_values(layer: nn.Module, prefix: str, loaded: Iterable[Tensor], errors: list[str]) -> bool:
    """Is the layer on the meta device, where the checkpoint of a plain convolution gives no values for all of it?

    Then that is noted as torch does for ``load_state_dict``.
    """
    empty = [name for name, t in (*layer.named_parameters(), *layer.named_buffers()) if t.is_meta]
    found = bool(empty) and not any(tensor.is_meta for tensor in loaded)
    if found:
        errors.append(
            f"{prefix}{empty[0]} is on the meta device, and a plain convolution's checkpoint has no values for it; "
            "load the plain network, then expand it"
        )
    return found


def plain_class(module: nn.Module) -> type | None:
    """The ``nn.Conv*d`` class that a module is or derives from; None for anything else.

    >>> plain_class(nn.Conv2d(1, 1, 1)).__name__, plain_class(nn.ReLU())
    ('Conv2d', None)
    """
    return next((cls for cls in PLAIN if isinstance(module, cls)), None)


def describe_rank(cls: Any) -> None:
    """Tell a rank class (``DOConv1d``) what its base says of all of them: its signature, what its docstring explains.

    Its signature is the plain layer's arguments, then the base's own by keyword. Its docstring, one line and perhaps an
    example, gets the base's in between, from ``Args:`` on.
    """
    plain = next((base for base in PLAIN if issubclass(cls, base)), None)
    if plain is None:
        return
    own = [p for p in inspect.signature(cls.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    cls.__signature__ = inspect.Signature([*inspect.signature(plain).parameters.values(), *own])
    _, args, explained = inspect.cleandoc(cls.__bases__[0].__doc__ or "").partition("\n\nArgs:")
    if plain in cls.__bases__ and args:
        line, example, run = inspect.cleandoc(cls.__doc__ or "").partition("\n\nExample:")
        takes = "\n\nIts arguments in the same order, then these by keyword."
        cls.__doc__ = f"{line}{takes}{args}{explained}{example}{run}"


def conv_arguments(conv: nn.Module) -> dict:
    """The constructor arguments of a convolution, by name, as it computes now: its attributes may have been edited."""
    plain: Any = conv
    weight = conv._parameters.get("weight")
    found = {"in_channels": plain.in_channels, "out_channels": plain.out_channels, "kernel_size": plain.kernel_size}
    if weight is not None and not isinstance(conv, Foldable):
        ends = (weight.shape[1] * plain.groups, weight.shape[0])
        ends = (weight.shape[0], weight.shape[1] * plain.groups) if plain.transposed else ends
        found = {"in_channels": ends[0], "out_channels": ends[1], "kernel_size": tuple(weight.shape[2:])}
    return found | arguments_in_use(conv) | {"bias": plain.bias is not None}


def consistent(conv: nn.Module) -> nn.Module:
    """The convolution, or one with its very parameters whose attributes say what it computes.

    >>> conv = nn.Conv2d(3, 8, 3)
    >>> conv.weight = nn.Parameter(conv.weight.detach().sum(1, keepdim=True))  # for grey images
    >>> conv.in_channels, consistent(conv).in_channels
    (3, 1)
    """
    arguments = conv_arguments(conv)
    if type(conv) not in PLAIN or all(
        getattr(conv, name) == value for name, value in arguments.items() if name != "bias"
    ):
        return conv
    cls: Any = plain_class(conv)
    plain = cls(**arguments, device="meta").train(conv.training)
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain


def layout_of(like: Tensor, tensor: Tensor) -> torch.memory_format:
    """The memory format of `like`, where `tensor` can have it."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if wanted is None or tensor.dim() != like.dim() or like.is_contiguous():
        return torch.contiguous_format
    return wanted if like.is_contiguous(memory_format=wanted) else torch.contiguous_format


def is_watched(module: nn.Module) -> bool:
    """Does anything watch the module's inputs, outputs or their gradients?"""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_altered(module: nn.Module) -> bool:
    """Does anything watch the module, or stand for its forward?"""
    return is_watched(module) or "forward" in vars(module)


def all_are_watched() -> bool:
    """Is there a hook on every module of the process?"""
    return bool(torch_module._has_any_global_hook())


def realize_like(source: nn.Module, kernel: Kernel) -> nn.Module:
    """A plain convolution computing `kernel`, with the class, arguments, dtype, layout and flags of `source`.

    `source` is the layer being folded: its geometry is kept word for word (``padding="same"`` stays) where it is
    itself a convolution; otherwise the kernel's own geometry decides.
    """
    cls = plain_class(source)
    dtype = next(p.dtype for p in source.parameters())
    if cls is None:
        plain = kernel.to_module().to(dtype)
    else:
        plain = undrawn(cls, **conv_arguments(source) | {"bias": kernel.bias is not None})
        old = weight_like(source)
        # empty_like keeps the memory format; copy_ casts once, at the end.
        plain.weight = nn.Parameter(torch.empty_like(old).copy_(_as_in(source, kernel, old)), old.requires_grad)
        if kernel.bias is not None:
            like: Any = old if source.bias is None else source.bias
            plain.bias = nn.Parameter(kernel.bias.detach().to(dtype, copy=True), requires_grad=like.requires_grad)
    plain.train(source.training)
    return plain


def weight_like(source: Any) -> Tensor:
    """The weight of a convolution, or of one that has none but computes it, a tensor with its properties."""
    own = source._parameters.get("weight")
    if own is None and hasattr(source, "blank_weight"):
        return source.blank_weight()
    return source.weight


def _as_in(source: nn.Module, kernel: Kernel, old: Tensor) -> Tensor:
    """The kernel's weight as a convolution of the source's geometry holds it, whose weight is `old`."""
    found = (transposed_geometry if kernel.transposed else conv_geometry)(source)
    if any(getattr(kernel, name, None) != value for name, value in found.items()):
        weight: Tensor = kernel.to_module().weight  # in a window that torch can pad
    else:
        weight = exchanged(kernel.weight, kernel.groups) if kernel.transposed else kernel.weight
    assert weight.shape == old.shape, "a layer that is a convolution folds into its own shape"
    return weight.detach()
