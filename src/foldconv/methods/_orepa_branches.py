"""What an OREPA kernel is made of: parameters by name, their initial values, and both evaluations of them.

The equation is at the top of `orepa.py`. A branch object holds shapes only; the tensors stay parameters of the layer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..algebra import Kernel

DEPTHWISE_FILTERS = 8


@dataclasses.dataclass(frozen=True)
class Branches:
    """The parameters of one OREPA kernel: their shapes and initial values, and both evaluations of them."""

    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    groups: int
    point: bool = True

    @property
    def scales(self) -> list[float]:
        """Initial values of the rows of `vector`, in the order of the branches."""
        return [0.25, 0.25, 0.0, 0.5, *([1.0] if self.point else []), 0.5]

    @property
    def per_group(self) -> tuple[int, int]:
        """Output and input channels of one group."""
        return self.out_channels // self.groups, self.in_channels // self.groups

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by name; the origin branch comes first."""
        i, point = self.per_group[1], (1,) * len(self.size)
        # More groups than this leave a group few channels; the inner 1×1 is then twice as wide.
        inner = self.in_channels * (1 if self.groups <= 4 else 2)
        one = (self.out_channels, i, *point)
        return {
            "weight": (self.out_channels, i, *self.size),
            "avg_conv": one,
            "prior_conv": one,
            "kxk_idconv1": (inner, i, *point),
            "kxk_conv2": (self.out_channels, inner // self.groups, *self.size),
            **({"conv_1x1": one} if self.point else {}),
            "gconv_dw": (self.in_channels * DEPTHWISE_FILTERS, 1, *self.size),
            "gconv_pw": (self.out_channels, i * DEPTHWISE_FILTERS, *point),
            "vector": (len(self.scales), self.out_channels),
        }

    def draw(self, p: dict[str, Tensor], preserve: bool) -> None:
        """The paper's values; with `preserve` ``weight`` stays and alone has a scale."""
        # OREPA_VGG, which has the 1×1 outside, draws by 1/√2 smaller.
        self._draw(p, preserve, a=0.0 if self.point else 1.0)
        nn.init.zeros_(p["kxk_idconv1"])

    def _draw(self, p: dict[str, Tensor], preserve: bool, a: float) -> None:
        for name, tensor in p.items():
            if name != "vector" and not (preserve and name == "weight"):
                nn.init.kaiming_uniform_(tensor, a=a)
        scales = [1.0] + [0.0] * (len(self.scales) - 1) if preserve else self.scales
        with torch.no_grad():
            for row, value in zip(p["vector"], scales):
                row.fill_(value)

    def compose(self, p: dict[str, Tensor]) -> Tensor:
        """The kernel, ``(out, in / groups, *size)``."""
        (o, i), g, m = self.per_group, self.groups, math.prod(self.size)
        branches = ops.Orepa(
            weight=p["weight"].flatten(2),
            average=p["avg_conv"].flatten(1),
            prior=p["prior_conv"].flatten(1),
            product=ops.compose_pointwise(self._inner(p).reshape(g, -1, i), p["kxk_conv2"].flatten(2), g),
            point=p["conv_1x1"].flatten(1) if self.point else None,
            pointwise=p["gconv_pw"].reshape(g * o, i, DEPTHWISE_FILTERS),
            depthwise=p["gconv_dw"].reshape(g * i, DEPTHWISE_FILTERS, m),
            scales=p["vector"],
            cosines=self.prior(p["weight"]),
            centre=self.centre,
        )
        return ops.compose_orepa(branches, g).reshape(p["weight"].shape)

    def kernels(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each branch with its scale, all of `compose`'s shape, which is their sum; written out one by one."""
        (o, i), g, m = self.per_group, self.groups, math.prod(self.size)
        first, second = self._inner(p).reshape(g, -1, i), p["kxk_conv2"].reshape(g, o, -1, m)
        deep = p["gconv_dw"].reshape(g, i, DEPTHWISE_FILTERS, m)
        wide = p["gconv_pw"].reshape(g, o, i, DEPTHWISE_FILTERS)
        found = {
            "origin": p["weight"].flatten(2),
            "average": p["avg_conv"].flatten(2) / m,
            "prior": p["prior_conv"].flatten(2) * self.prior(p["weight"]).unsqueeze(1),
            "stack": torch.einsum("gotm,gti->goim", second, first),
        }
        if self.point:
            at_centre = torch.zeros(m, dtype=p["weight"].dtype, device=p["weight"].device)
            at_centre[self.centre] = 1
            found["point"] = p["conv_1x1"].flatten(2) * at_centre
        found["separable"] = torch.einsum("goit,gitm->goim", wide, deep)
        shape = p["weight"].shape
        return {
            name: (kernel.reshape(g * o, i, -1) * scale.reshape(-1, 1, 1)).expand(-1, -1, m).reshape(shape)
            for scale, (name, kernel) in zip(p["vector"], found.items())
        }

    @property
    def centre(self) -> int:
        """The tap of the 1×1 branch among the flattened taps."""
        index = 0
        for k in self.size:
            index = index * k + (k - 1) // 2
        return index

    def features(
        self,
        p: dict[str, Tensor],
        x: Tensor,
        *,
        dilation: tuple[int, ...],
        groups: int,
        stride: tuple[int, ...] = (),
        padding: tuple[tuple[int, int], ...] = (),
        padding_mode: str = "zeros",
    ) -> Tensor:
        """Every branch on feature maps, scaled and added; the geometry as in `Kernel`."""
        pads = {"padding": padding, "padding_mode": padding_mode}
        width, n = self.out_channels, len(self.size)

        def alone(weight: Tensor, groups: int = groups) -> Tensor:
            return Kernel(weight, groups=groups, dilation=dilation, stride=stride, **pads)(x)

        def chain(first: Tensor, second: Tensor, groups_second: int) -> Tensor:
            y = Kernel(first, groups=groups, **pads)(x)
            return Kernel(second, groups=groups_second, dilation=dilation, stride=stride)(y)

        ones = x.new_ones(width, 1, *self.size)
        branches = [
            alone(p["weight"]),
            chain(p["avg_conv"], ones / math.prod(self.size), width),
            chain(p["prior_conv"], self.prior(x).reshape(ones.shape), width),
            chain(self._inner(p), p["kxk_conv2"], groups),
        ]
        if self.point:
            before = [(k - 1) // 2 * d for k, d in zip(self.size, dilation)]
            after = [k // 2 * d for k, d in zip(self.size, dilation)]
            old = padding or ((0, 0),) * n
            moved = tuple((b - i, a - j) for (b, a), i, j in zip(old, before, after))
            at_centre = Kernel(p["conv_1x1"], groups=groups, stride=stride, padding=moved, padding_mode=padding_mode)
            branches.append(at_centre(x))
        branches.append(Kernel(p["gconv_pw"], groups=groups)(alone(p["gconv_dw"], self.in_channels)))
        scales = p["vector"].reshape(-1, width, *(1,) * n)
        return sum((s * y for s, y in zip(scales[1:], branches[1:])), scales[0] * branches[0])

    def _inner(self, p: dict[str, Tensor]) -> Tensor:
        """The 1×1 before the k×k: each input channel passed on (twice if twice as wide), plus what is learned."""
        added, i = p["kxk_idconv1"], self.per_group[1]
        identity = torch.eye(i, dtype=added.dtype, device=added.device).repeat(added.shape[0] // i, 1)
        return added + identity.reshape(added.shape)

    def prior(self, like: Tensor) -> Tensor:
        """The fixed cosines, ``(out, taps)``, in `like`'s dtype."""
        key = (self.out_channels, self.size, like.device, like.dtype)
        if ops.is_recorded():
            return _cosines(*key)
        found = _priors.get(key)
        if found is None:
            found = _cosines(*key)
            # What inference mode made, or a mode that fakes tensors, serves nobody else.
            if type(found) is Tensor and not found.is_inference():
                _priors[key] = found
        return found

    def cost(self) -> int:
        """Multiply-adds of composing: two products, and one scale per branch."""
        shapes = self.shapes()
        products = shapes["kxk_conv2"][1] + DEPTHWISE_FILTERS + len(self.scales)
        return math.prod(shapes["weight"]) * products


class Pointwise(Branches):
    """OREPA_1x1: the kernel, and a product of two, of which the narrower starts as the identity."""

    @property
    def scales(self) -> list[float]:
        return [1.0, 0.5]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        point, inner = self.size, min(self.in_channels, self.out_channels)
        return {
            "weight": (self.out_channels, self.in_channels, *point),
            "l2i_conv1": (inner, self.in_channels, *point),
            "l2i_conv2": (self.out_channels, inner, *point),
            "vector": (2, self.out_channels),
        }

    def draw(self, p: dict[str, Tensor], preserve: bool) -> None:
        self._draw(p, preserve, a=1.0)
        identity = p["l2i_conv1" if self.out_channels > self.in_channels else "l2i_conv2"]
        with torch.no_grad():
            identity.copy_(torch.eye(len(identity), dtype=identity.dtype).reshape(identity.shape))

    def compose(self, p: dict[str, Tensor]) -> Tensor:
        origin, product = self.kernels(p).values()
        return origin + product

    def kernels(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        product = (p["l2i_conv2"].flatten(1) @ p["l2i_conv1"].flatten(1)).reshape(p["weight"].shape)
        first, second = p["vector"].reshape(2, -1, *(1,) * (product.dim() - 1))
        return {"origin": first * p["weight"], "product": second * product}

    def features(
        self,
        p: dict[str, Tensor],
        x: Tensor,
        *,
        dilation: tuple[int, ...],
        groups: int,
        stride: tuple[int, ...] = (),
        padding: tuple[tuple[int, int], ...] = (),
        padding_mode: str = "zeros",
    ) -> Tensor:
        first, second = p["vector"].reshape(2, -1, *(1,) * len(self.size))
        pads = {"padding": padding, "padding_mode": padding_mode}
        product = Kernel(p["l2i_conv2"], stride=stride)(Kernel(p["l2i_conv1"], **pads)(x))
        return first * Kernel(p["weight"], stride=stride, **pads)(x) + second * product

    def cost(self) -> int:
        return self.in_channels * self.out_channels * (min(self.in_channels, self.out_channels) + 2)


class PlainKernel(Branches):
    """A plain kernel, as in the original's LargeConvBase."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.out_channels, self.per_group[1], *self.size)}

    def draw(self, p: dict[str, Tensor], preserve: bool) -> None:
        nn.init.kaiming_uniform_(p["weight"], a=math.sqrt(5))

    def compose(self, p: dict[str, Tensor]) -> Tensor:
        return p["weight"]

    def kernels(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"kernel": p["weight"]}

    def features(self, p: dict[str, Tensor], x: Tensor, **geometry: Any) -> Tensor:
        return Kernel(p["weight"], **geometry)(x)

    def cost(self) -> int:
        return 0


_priors: dict[tuple[Any, ...], Tensor] = {}


def _cosines(out: int, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # In single precision whatever the dtype, as the original stores them: a fold in float64 then computes what was
    # trained. MPS has no float64 to compute them in.
    where = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}
    n, filters = len(size), torch.arange(out, **where)
    axis = torch.div(filters * n, out, rounding_mode="floor")
    frequency = filters + 1 - axis * (out / n)
    positions = torch.meshgrid(*((torch.arange(k, **where) + 0.5) / k for k in size), indexing="ij")
    phase = torch.stack(positions).reshape(n, -1)[axis.long()]
    return torch.cos(math.pi * phase * frequency[:, None]).float().to(device, dtype)
