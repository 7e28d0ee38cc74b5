"""Both evaluations of an OREPA kernel, and its parameters' first values.

The equation is at the top of `orepa.py`; names, shapes and scales are `foldconv.formulas.OrepaParts`'. A branch object
holds shapes only; the tensors stay parameters of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import formulas, ops
from ..algebra import Kernel


class Branches(formulas.OrepaParts):
    """The parameters of one OREPA kernel: their shapes and initial values, and both evaluations of them."""

    def draw(self, p: dict[str, Tensor], preserve: bool) -> None:
        """The paper's values; with `preserve` ``weight`` stays and alone has a scale."""
        slope = formulas.orepa_slope(self.taps, self.point)
        for name, tensor in p.items():
            if name != "vector" and not (preserve and name == "weight"):
                nn.init.kaiming_uniform_(tensor, a=slope)
        (nn.init.dirac_ if self.taps == 1 else nn.init.zeros_)(p[self.undrawn])
        with torch.no_grad():
            for number, (row, scale) in enumerate(zip(p["vector"], self.scales)):
                row.fill_(float(number == 0) if preserve else scale)

    def compose(self, p: dict[str, Tensor]) -> Tensor:
        """The kernel, ``(out, in / groups, *size)``."""
        return ops.compose_orepa(self._as_parameters(p), self.groups)

    def compose_compiled(self, p: dict[str, Tensor]) -> Tensor | None:
        """`compose` where Numba composed such parameters before and nothing looks on; None elsewhere."""
        return ops.compose_orepa_compiled(self._as_parameters(p), self.groups)

    def kernels(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each branch with its scale, all of `compose`'s shape, which is their sum."""
        return ops.orepa_branches(self._as_parameters(p), self.groups)

    def _as_parameters(self, p: dict[str, Tensor]) -> ops.OrepaParameters:
        return ops.OrepaParameters(
            weight=p["weight"],
            average=p["avg_conv"],
            prior=p["prior_conv"],
            inner=p["kxk_idconv1"],
            second=p["kxk_conv2"],
            point=p["conv_1x1"] if self.point else None,
            depthwise=p["gconv_dw"],
            pointwise=p["gconv_pw"],
            scales=p["vector"],
            cosines=self.prior(p["weight"]),
            centre=formulas.centre_tap(self.size),
        )

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
            chain(p["avg_conv"], ones / self.taps, width),
            chain(p["prior_conv"], self.prior(x).reshape(ones.shape), width),
            chain(ops.passed_on(p["kxk_idconv1"]), p["kxk_conv2"], groups),
        ]
        if self.point:
            beside = [(m * d, (k - 1 - m) * d) for m, k, d in zip(formulas.middle(self.size), self.size, dilation)]
            old = padding or ((0, 0),) * n
            moved = tuple((b - i, a - j) for (b, a), (i, j) in zip(old, beside))
            at_centre = Kernel(p["conv_1x1"], groups=groups, stride=stride, padding=moved, padding_mode=padding_mode)
            branches.append(at_centre(x))
        branches.append(Kernel(p["gconv_pw"], groups=groups)(alone(p["gconv_dw"], self.in_channels)))
        scales = p["vector"].reshape(-1, width, *(1,) * n)
        return sum((s * y for s, y in zip(scales[1:], branches[1:])), scales[0] * branches[0])

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
        products = shapes["kxk_conv2"][1] + self.FILTERS + len(self.scales)
        return math.prod(shapes["weight"]) * products


class Pointwise(Branches):
    """OREPA_1x1: the kernel, and a product of two, of which the narrower starts as the identity."""

    def compose(self, p: dict[str, Tensor]) -> Tensor:
        # The formula, with the scale on the factor and the sum inside the product: a third of the passes.
        first, second = p["vector"].unsqueeze(2)
        found = torch.addmm(
            first * p["weight"].flatten(1), second * p["l2i_conv2"].flatten(1), p["l2i_conv1"].flatten(1)
        )
        return found.reshape(p["weight"].shape)

    def kernels(self, p: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(self._scaled(p))

    def _scaled(self, p: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        product = (p["l2i_conv2"].flatten(1) @ p["l2i_conv1"].flatten(1)).reshape(p["weight"].shape)
        return formulas.orepa_1x1(p["weight"], product, p["vector"].reshape(2, -1, *(1,) * (product.dim() - 1)))

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
    filters, taps = torch.arange(out, **where)[:, None], torch.arange(math.prod(size), **where)
    return formulas.cosines(filters, taps, size, torch.cos).float().to(device, dtype)
