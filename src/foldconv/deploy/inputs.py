"""The tensors that a network is called with, and batches of other sizes made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..network._watching import arguments_of


class ByKeyword(nn.Module):
    """A network that is called with keyword arguments, called with positional ones."""

    def __init__(self, network: nn.Module, names: Sequence[str]):
        super().__init__()
        self.network = network
        self.names = tuple(names)

    def forward(self, *values: Tensor) -> Any:
        """The outputs, for the values in the order of their names."""
        return self.network(**dict(zip(self.names, values)))


def with_tensors(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network and the tensors that it is called with."""
    args, kwargs = arguments_of(example_inputs)
    values = [*args, *kwargs.values()]
    for value in values:
        if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != len(values[0]) or not len(value):
            raise UnsupportedError(
                "example_inputs: expected tensors whose first dimension is one batch, of at least one sample, received "
                f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}; wrap the network in one "
                "that takes such tensors"
            )
    if not values:
        raise UnsupportedError("example_inputs: expected a tensor, a tuple or a dictionary of them, received none")
    if kwargs:
        model = ByKeyword(model, tuple(kwargs))
    return model, tuple(value.detach() for value in values)


def as_weights(model: nn.Module, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors where the model's weights are, numbers with a fraction in their width.

    Example:
        >>> as_weights(nn.Linear(2, 1).half(), [torch.zeros(1, 2), torch.tensor([3])])
        (tensor([[0., 0.]], dtype=torch.float16), tensor([3]))
    """
    own = next((each for each in model.parameters() if each.is_floating_point() and not each.is_meta), None)
    if own is None:
        return tuple(values)
    return tuple(value.to(own.device, own.dtype if value.is_floating_point() else None) for value in values)


def batch_of(inputs: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """`size` samples, made of the example's in turn; numbers with a fraction get smaller from one to the next."""
    picked = [value[torch.arange(size) % len(value)] for value in inputs]
    shrink = 1 - torch.arange(size) / (2 * size + 2)
    return tuple(x * shrink.to(x.dtype).view(-1, *(1,) * (x.dim() - 1)) if x.is_floating_point() else x for x in picked)
