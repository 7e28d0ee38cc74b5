"""The convolutions that every check is run on."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.norms import is_norm
from ..layers import Foldable
from ..methods import Method
from ..network.tree import foldable_layers


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution of the sweep and the input it is run on."""

    cls: type
    arguments: tuple[tuple[str, Any], ...]
    spatial: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments)})"

    def network(self) -> Any:
        """Convolution and norm, float64, evaluation mode, random statistics."""
        conv = self.cls(**dict(self.arguments), dtype=torch.float64)
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(self.spatial) - 1]
        net = nn.Sequential(OrderedDict(conv=conv, norm=norm(conv.out_channels, dtype=torch.float64)))
        randomize(net, parameters=False)
        return net.eval()

    def input(self) -> Tensor:
        """A random float64 batch of two."""
        return torch.randn(2, dict(self.arguments)["in_channels"], *self.spatial, dtype=torch.float64)


def _cases() -> list[Case]:
    base = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}
    variants: list[dict[str, Any]] = [
        {},
        {"bias": False},
        {"padding": 0},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"groups": 4, "out_channels": 4},
        {"groups": 4, "out_channels": 8, "stride": 2},
        {"in_channels": 1},
        {"in_channels": 6},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 1, "padding": 0, "stride": 2, "groups": 2},
    ]
    flat = [
        *variants,
        {"kernel_size": 2, "padding": 1},
        {"kernel_size": 4, "padding": (1, 2), "stride": (2, 1)},
        {"kernel_size": (3, 5), "padding": (1, 2), "stride": (1, 2)},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)},
        {"padding": "valid"},
        {"kernel_size": 5, "padding": 2, "groups": 4, "out_channels": 4},
        {"kernel_size": 7, "padding": 2, "groups": 4, "out_channels": 4, "stride": 2},
        {"kernel_size": 7, "padding": 3, "stride": 2},
        {"in_channels": 8, "out_channels": 16},
        *({"padding": (1, 2), "kernel_size": (3, 5), "padding_mode": m} for m in ("reflect", "replicate", "circular")),
        {"padding": "same", "kernel_size": 4, "padding_mode": "reflect"},
    ]
    up = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    ups = [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"groups": 2, "dilation": 2},
        {"kernel_size": 2, "stride": 2},
    ]
    make = [(nn.Conv1d, base | v, (11,)) for v in variants]
    make += [(nn.Conv2d, base | v, (9, 10)) for v in flat]
    make += [(nn.Conv3d, base | v, (5, 6, 5)) for v in variants[:8]]
    make += [(nn.ConvTranspose2d, up | v, (4, 5)) for v in ups]
    make += [(nn.ConvTranspose1d, up | ups[1], (5,)), (nn.ConvTranspose3d, up | ups[1], (3, 2, 3))]
    return [Case(cls, tuple(arguments.items()), spatial) for cls, arguments, spatial in make]


@functools.cache
def _to_look_at() -> list[tuple[Case, Any, Any]]:
    """Each case with a convolution and a norm that methods only look at, made once."""
    return [(case, *case.network()) for case in _cases()]


def cases(method: Method) -> list[Case]:
    """The sweep: the convolutions that the method applies to, over rank, stride, dilation, groups, padding and size.

    >>> from foldconv import get_method
    >>> len(cases(get_method("doconv")())) > 30
    True
    """
    found = [case for case, conv, norm in _to_look_at() if method.reason_against(conv, norm) is None]
    assert found, f"{method.name} applies to none of the convolutions of the sweep"
    return found


def typical(method: Method) -> Case:
    """One of the `cases`, in two dimensions if there is such a one."""
    found = cases(method)
    return next((case for case in found if case.cls is nn.Conv2d), found[0])


def only_layer(model: nn.Module) -> Foldable:
    """The foldable layer of an expanded `Case.network`."""
    layers = list(foldable_layers(model).values())
    assert len(layers) == 1, f"expected one foldable layer, found {len(layers)}"
    return layers[0]


def assert_close(received: Tensor, expected: Tensor, tolerance: float, what: object) -> None:
    """The same shape, and values that differ by at most `tolerance` of the largest expected one."""
    assert received.shape == expected.shape, f"{what}: expected shape {expected.shape}, received {received.shape}"
    error = (received.double() - expected.double()).abs().max().item()
    allowed = tolerance * max(1.0, expected.double().abs().max().item())
    assert error <= allowed, f"{what}: expected a difference of at most {allowed:.1e}, received {error:.1e}"


def randomize(model: nn.Module, *, parameters: bool = True) -> None:
    """Random norm statistics and, unless switched off, random values in every parameter."""
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module):
                module.running_mean.normal_(std=0.3)  # pyright: ignore
                module.running_var.uniform_(0.5, 2.0)  # pyright: ignore
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)  # pyright: ignore
                if module.bias is not None:
                    module.bias.normal_(std=0.3)  # pyright: ignore
        if parameters:
            for layer in foldable_layers(model).values():
                for _, p in layer.named_parameters():
                    p.add_(torch.randn_like(p), alpha=0.3)
