"""`composed_once`: many evaluation forwards on unchanged weights, each at the plain network's cost.

Nothing is kept on a layer, and outside the context nothing at all. Inside, `_open` holds a plain convolution for each
layer. Invariants, in the order in which a forward decides:

1. A compiler, tracer, function transform or CUDA graph that looks on sees the parameters, as outside.
2. A layer in training mode, gradients wanted of its parameters, and a tensor of the layer that is not what it was,
   where that can be seen (another object, version counter or storage), are refused.
3. A layer without an exact kernel, one that is watched inside (a hook, a forward replaced) or altered (a module added,
   an attribute set), and tensors that are no plain parameters (sharded, parametrized, without values) run as outside.
4. Every other layer runs its plain convolution.

Writing that no counter sees (``p.data.add_(...)``, fused optimizers, memory that processes share) cannot be refused:
leave the context before the weights change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..algebra.norms import is_norm
from ..errors import UnsupportedError
from ..ops import is_recorded
from .foldable import Foldable, as_a_call, is_watched

_Model = TypeVar("_Model", bound=nn.Module)
_open: list[dict[Foldable, _Composed]] = []
"""What each context that is open now has composed, the innermost last."""


@contextlib.contextmanager
def composed_once(model: _Model) -> Iterator[_Model]:
    """Evaluate at the plain network's cost without folding: each foldable layer is composed once, when this is entered.

    Args:
        model: any module, in evaluation mode; yielded unchanged.

    Raises:
        UnsupportedError: naming the layer: a foldable layer is in training mode, here or at a forward inside; a forward
            records gradients for its parameters; one of its parameters or buffers was written to.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> net = foldconv.expand(net, "repvgg").eval()
        >>> with foldconv.composed_once(net), torch.no_grad():
        ...     outputs = [net(torch.zeros(1, 3, 9, 9)) for _ in range(3)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, received {type(model).__name__}")
    composed = {} if is_recorded() else {layer: _Composed(name, layer) for name, layer in _outermost(model)}
    _open.append(composed)
    try:
        yield model
    finally:
        _open.remove(composed)


def evaluated_once(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a layer's forward: inside `composed_once` its plain convolution runs instead, and torch.fx sees a call.

    A subclass with a forward of its own, not decorated, runs that: what it adds may be part of its kernel.
    """

    @functools.wraps(forward)
    def evaluated(layer: Foldable, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The compiler comes first, so that it need not look at what is open.
        if torch.compiler.is_compiling():
            return forward(layer, input, *args, **kwargs)
        if type(input) is not Tensor:
            traced = as_a_call(layer, input, args, kwargs)
            if traced is not None:
                return traced
        if _open and isinstance(input, Tensor):
            composed = next((context[layer] for context in reversed(_open) if layer in context), None)
            plain = None if composed is None else composed.instead(input)
            if plain is not None:
                return plain(input, *args, **kwargs)
        return forward(layer, input, *args, **kwargs)

    evaluated.is_evaluated_once = True  # pyright: ignore[reportAttributeAccessIssue]
    return evaluated


def _outermost(module: nn.Module, name: str = "") -> Iterator[tuple[str, Foldable]]:
    if isinstance(module, Foldable):
        yield name or "the root", module
    else:
        for key, child in module.named_children():
            yield from _outermost(child, f"{name}.{key}" if name else key)


class _Composed:
    """The plain convolution of a layer, None where it has to run itself; and the state in which that was so."""

    def __init__(self, name: str, layer: Foldable):
        self.name, self.layer = name, layer
        self.modules = dict(layer.named_modules())
        self.refuse_training()
        self.plain = _plain(layer)
        # Comparing these is quick, for nearly all values are the very same objects.
        self.structure = [(m, vars(m).copy(), m._modules.copy()) for m in self.modules.values()]
        self.tensors = [
            (held, key, path, tensor, *_state(tensor))
            for path, module in self.modules.items()
            for held in (module._parameters, module._buffers)
            for key, tensor in held.items()
        ]

    def instead(self, input: Tensor) -> nn.Module | None:
        """What runs in the layer's place now, if anything."""
        if is_recorded() or (input.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        self.refuse_training()
        if self.plain is None or any(is_watched(m) for m in self.modules.values() if m is not self.layer):
            return None
        if any(vars(m) != attributes or m._modules != children for m, attributes, children in self.structure):
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for _, p in self.layer.named_parameters()):
            raise UnsupportedError(
                f"{self.name}: gradients are recorded for its parameters inside composed_once; use torch.no_grad(), or "
                "leave the context to train"
            )
        for held, key, path, tensor, *state in self.tensors:
            if held.get(key) is not tensor or _state(tensor) != state:
                which = f"{path}.{key}" if path else key
                raise UnsupportedError(
                    f"{self.name}: its {which} was written to inside composed_once, after its kernel was composed; "
                    "leave the context and enter it again"
                )
        return self.plain

    def refuse_training(self) -> None:
        """Statistics and gradients would change what was composed."""
        for path, module in self.modules.items():
            if module.training:
                which = f"its {path} is" if path else "it is"
                raise UnsupportedError(
                    f"{self.name}: {which} in training mode, and composed_once is for evaluation; call eval() first, "
                    "or leave the context to train"
                )


def _state(tensor: Tensor | None) -> list[int]:
    """Changes when a tensor is written to, as far as it tells, or lives elsewhere."""
    return [] if tensor is None or tensor.is_inference() else [tensor._version, tensor.data_ptr()]


def _plain(layer: Foldable) -> nn.Module | None:
    """The plain convolution of a layer's evaluation function, composed in float32 at least, without gradients."""
    modules = list(layer.modules())
    parameters = [p for _, p in layer.named_parameters()]
    tensors = [*parameters, *layer.buffers()]
    types = {p.dtype for m in modules if not is_norm(m) for p in m._parameters.values() if p is not None}
    if (
        not hasattr(type(layer).forward, "is_evaluated_once")
        or any("forward" in vars(m) for m in modules[1:])
        or len(types) != 1
        or len({t.device for t in tensors}) != 1
        # MPS has no float64, in which norms are folded.
        or tensors[0].device.type in ("meta", "mps")
        or any(type(p) is not nn.Parameter for p in parameters)
        or any(t.is_inference() for t in tensors)
        # What is computed from parameters, or stands beside them, has no version of its own.
        or any("parametrizations" in m._modules for m in modules)
        or any(isinstance(value, Tensor) for m in modules for value in vars(m).values())
    ):
        return None
    (dtype,) = types
    # Outside inference mode, so that the input's gradient may flow through it.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        try:
            kernel = layer.to_kernel(torch.promote_types(dtype, torch.float32))
        except UnsupportedError:
            return None
        return layer.realize(kernel).to(dtype).requires_grad_(False)
