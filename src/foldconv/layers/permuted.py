"""`PermutedConv1d/2d/3d`: a grouped convolution whose groups are made of channels that do not lie side by side.

    y = conv(x[:, input_order])[:, output_order]

torch's grouped convolution knows only groups of neighbouring channels; any other grouping is that convolution
between two permutations. Reordering channels costs a copy and no arithmetic; `foldconv.absorb_permutations` removes
the copy too, where the network around the layer allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Kernel
from ..algebra.rules import conv_geometry
from ..errors import UnsupportedError
from .foldable import conv_arguments, describe_rank, layout_of, plain_class

Order = Sequence[int] | Tensor | None


class _PermutedConvNd(nn.Module):
    """Mixin before ``nn.Conv1d`` ... ``nn.Conv3d``: the two orders, and what they mean.

    Args:
        input_order: the convolution's channel ``c`` is the input's channel ``input_order[c]``; None: as they come.
        output_order: the output's channel ``c`` is the convolution's channel ``output_order[c]``; None: as they come.

    Shapes:
        input, output, ``weight`` and ``bias`` as in the plain layer; the buffers ``input_order`` ``(in,)`` and
        ``output_order`` ``(out,)``, int64, are in the state dict, or None.

    Raises:
        UnsupportedError: for an order that is no permutation of the channels.
    """

    input_order: Tensor | None
    output_order: Tensor | None
    # Declared for type checkers; set by nn.Conv*d.
    weight: Tensor
    bias: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        describe_rank(cls)

    def __init__(self, *args: Any, input_order: Order = None, output_order: Order = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        conv: Any = self
        for name, order, channels in (
            ("input_order", input_order, conv.in_channels),
            ("output_order", output_order, conv.out_channels),
        ):
            self.register_buffer(name, None if order is None else _permutation(name, order, channels, self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """Gather the channels, convolve in groups, put the channels back; shapes as in the plain layer."""
        channel = 1 if input.dim() == self.weight.dim() else 0  # without a batch, channels come first
        if self.input_order is not None:
            input = input.index_select(channel, self.input_order)
        output = super().forward(input)
        return output if self.output_order is None else output.index_select(channel, self.output_order)

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The function as one kernel, of one group, in `dtype` (None: the parameters' own)."""
        weight = self.weight if dtype is None else self.weight.to(dtype)
        bias = self.bias if dtype is None or self.bias is None else self.bias.to(dtype)
        kernel = Kernel(weight, bias, **conv_geometry(self)).grouped(1)
        if self.input_order is not None:
            kernel = kernel.replace(weight=kernel.weight[:, self.input_order.argsort()])
        if self.output_order is not None:
            bias = None if kernel.bias is None else kernel.bias[self.output_order]
            kernel = kernel.replace(weight=kernel.weight[self.output_order], bias=bias)
        return kernel

    def extra_repr(self) -> str:
        """torch's description, and which sides are permuted."""
        sides = [side for side in ("input", "output") if getattr(self, f"{side}_order") is not None]
        return ", ".join([super().extra_repr(), *(f"{side}_order=..." for side in sides)])


class PermutedConv1d(_PermutedConvNd, nn.Conv1d):
    """``nn.Conv1d`` between two channel permutations."""


class PermutedConv2d(_PermutedConvNd, nn.Conv2d):
    """``nn.Conv2d`` between two channel permutations.

    Example:
        >>> layer = PermutedConv2d(4, 4, 1, groups=4, bias=False, input_order=[0, 2, 1, 3], output_order=[0, 2, 1, 3])
        >>> layer
        PermutedConv2d(4, 4, kernel_size=(1, 1), stride=(1, 1), groups=4, bias=False, input_order=..., output_order=...)
        >>> [key for key in layer.state_dict()]
        ['weight', 'input_order', 'output_order']
    """


class PermutedConv3d(_PermutedConvNd, nn.Conv3d):
    """``nn.Conv3d`` between two channel permutations."""


PERMUTED: dict[type, Any] = {nn.Conv1d: PermutedConv1d, nn.Conv2d: PermutedConv2d, nn.Conv3d: PermutedConv3d}


def realize_grouped(
    source: nn.Module, kernel: Kernel, groups: int, input_order: Sequence[int], output_order: Sequence[int]
) -> nn.Module:
    """The grouped convolution, permuted if need be, that computes a `kernel` with zeros outside its groups.

    Args:
        source: the convolution being replaced: its arguments, dtype, memory format and flags are kept.
        kernel: of ``source``'s geometry and groups.
        groups: how many groups the channels fall into, a multiple of ``source``'s own.
        input_order, output_order: all channels, group after group.
    """
    device, conv, weight = kernel.weight.device, conv_arguments(source), kernel.weight.detach()
    rows = torch.tensor(output_order, device=device).reshape(groups, -1, 1)
    # A row of the weight holds the channels of its own group of the source only.
    columns = torch.tensor(input_order, device=device).reshape(groups, 1, -1) % weight.shape[1]
    picked = weight[rows, columns].flatten(0, 1)
    back = torch.tensor(output_order, device="cpu").argsort().tolist()
    orders = {"input_order": list(input_order), "output_order": back}
    orders = {name: order for name, order in orders.items() if order != sorted(order)}
    cls: Any = plain_class(source)
    cls = PERMUTED[cls] if orders else cls
    arguments = conv | {"groups": groups, "bias": kernel.bias is not None} | orders
    plain: Any = cls(**arguments, device="meta")
    old: Tensor = source.weight  # pyright: ignore[reportAssignmentType]
    plain.weight = nn.Parameter(
        picked.to(old.dtype).contiguous(memory_format=layout_of(old, picked)), old.requires_grad
    )
    if kernel.bias is not None:
        like: Any = old if source.bias is None else source.bias
        plain.bias = nn.Parameter(kernel.bias.detach()[rows.flatten()].to(old.dtype), like.requires_grad)
    for name, order in orders.items():
        setattr(plain, name, torch.tensor(order, device=old.device))
    return plain.train(source.training)


def regrouped(conv: nn.Module, groups: int, *, input_order: bool, output_order: bool) -> nn.Module:
    """A convolution like the plain `conv` with more groups and, where told, orders: its values are still to be loaded.

    Example:
        >>> regrouped(nn.Conv2d(4, 4, 3), 2, input_order=False, output_order=False)
        Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), groups=2)
    """
    plain: Any = plain_class(conv)
    arguments = conv_arguments(conv) | {"groups": groups}
    if input_order or output_order:
        arguments["input_order"] = range(arguments["in_channels"]) if input_order else None
        arguments["output_order"] = range(arguments["out_channels"]) if output_order else None
        plain = PERMUTED[plain]
    weight: Tensor = conv.weight  # pyright: ignore[reportAssignmentType]
    made = plain(**arguments, device=weight.device, dtype=weight.dtype)
    return made.to(memory_format=layout_of(weight, weight)) if weight.dim() == 4 else made


def _permutation(name: str, order: Any, channels: int, like: Tensor) -> Tensor:
    """The order as a tensor, if it is one."""
    values = [int(channel) for channel in order]
    if sorted(values) != list(range(channels)):
        shown = str(values) if len(values) <= 16 else f"{len(values)} numbers"
        raise UnsupportedError(f"{name}: expected each of the {channels} channels 0 ... once, received {shown}")
    return torch.tensor(values, device=like.device)
