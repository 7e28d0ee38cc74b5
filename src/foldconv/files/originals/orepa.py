"""Checkpoints of JUGGHM/OREPA_CVPR2022: its OREPA blocks (types ``OREPA`` and ``OREPA_VGG``).

Five kinds of block, each with a norm ``bn``; the plain network has a convolution and its norm there, in the zoo's
``orepa_resnet*`` and ``plain_repvgg*`` called ``conv`` and ``bn``:

    OREPA            k×k, ``weight_orepa_*`` and ``vector``
    OREPA_1x1        ``weight_or1x1_*`` and ``vector``
    LargeConv        7×7 and larger, a chain of OREPA kernels ``weight0``, ``weight1``, ...
    LargeConvBase    the same of plain kernels
    OREPA_VGG        ``rbr_dense`` (``weight_rbr_*``, ``vector``), ``rbr_1x1``, ``rbr_identity``

Folded by the original's code it is the convolution ``orepa_reparam``, ``or1x1_reparam``, ``or_large_reparam`` or
``rbr_reparam``. Its DBB and RepVGG networks are the sources ``dbb`` and ``repvgg``.

What differs from ours, and is converted:

* chains: the original omits the flip of the later kernels, so those are flipped here, and its function stays;
* ``gconv_pw`` with groups: the original reads the rows with the group as the inner index;
* the average: a single-precision 1/k², whose rounding goes into ``avg_conv``;
* ``vector`` of OREPA_VGG: it may hold a row for the identity, never set and never read, which is left out;
* ``prior``: left out where it is the paper's cosines, up to the sign that flipping gives them. Otherwise (odd widths in
  a chain; kernels other than 3×3, for which the original leaves it uninitialized) the kernel is imported composed: it
  becomes ``weight``, the scales of the other branches 0.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...methods import OREPA, OREPAVGG
from ...methods._orepa_branches import Branches
from ._blocks import NORM, Blocks, Layer

# By our names; the original puts ``weight_orepa_`` or ``weight_rbr_`` before all but ``vector``.
_KERNEL = {
    "weight": "origin",
    "avg_conv": "avg_conv",
    "prior_conv": "pfir_conv",
    "kxk_idconv1": "1x1_kxk_idconv1",
    "kxk_conv2": "1x1_kxk_conv2",
    "conv_1x1": "1x1",
    "gconv_dw": "gconv_dw",
    "gconv_pw": "gconv_pw",
}
_POINTWISE = {
    "weight_or1x1_origin": "weight",
    "weight_or1x1_l2i_conv1": "l2i_conv1",
    "weight_or1x1_l2i_conv2": "l2i_conv2",
    "vector": "vector",
    "bn": NORM,
}
_VGG = {
    "rbr_dense.bn": "body.main.norm",
    "rbr_1x1.conv": "body.point.conv",
    "rbr_1x1.bn": "body.point.norm",
    "rbr_identity": "body.identity.0",
}
_WINDOWS = ("weight", "kxk_conv2", "gconv_dw")


def _layer(tensors: dict[str, Tensor], conv: Any) -> Layer:
    if "weight_or1x1_origin" in tensors:
        return Layer(OREPA(), _POINTWISE, tensors)
    values, size = dict(tensors), tuple(conv.kernel_size)
    if "rbr_dense.weight_rbr_origin" in tensors:
        branches = Branches(conv.in_channels, conv.out_channels, size, conv.groups, point=False)
        names = _convert(values, branches, "rbr_dense.", "weight_rbr_")
        return Layer(OREPAVGG(), _VGG | {theirs: f"body.main.conv.{ours}" for theirs, ours in names.items()}, values)
    stages = {match[1]: match[0] for key in tensors if (match := re.match(r"weight(\d+)(?=\.|$)", key))}
    if not stages:
        branches = Branches(conv.in_channels, conv.out_channels, size, conv.groups)
        return Layer(OREPA(), {**_convert(values, branches), "bn": NORM}, values)
    plain, all_names = "weight0" in tensors, {"bn": NORM}
    for number, stage in stages.items():
        first = number == "0"
        if plain:
            all_names[stage] = stage
            if not first and values[stage].dim() == 4:
                values[stage] = values[stage].flip(2, 3)
            continue
        branches = Branches(conv.in_channels if first else conv.out_channels, conv.out_channels, (3, 3), conv.groups)
        names = _convert(values, branches, f"{stage}.", later=not first)
        all_names |= {theirs: f"{ours}{number}" for theirs, ours in names.items()}
    return Layer(OREPA(large="plain" if plain else "orepa"), all_names, values)


def _convert(
    values: dict[str, Tensor], branches: Branches, prefix: str = "", word: str = "weight_orepa_", later: bool = False
) -> dict[str, str]:
    """Convert the tensors of one kernel in place; returns the original's names with ours.

    `later`: it stands behind another kernel in a chain.
    """
    shapes = branches.shapes()
    names = {ours: f"{prefix}{word}{theirs}" for ours, theirs in _KERNEL.items() if ours in shapes}
    names["vector"] = f"{prefix}vector"
    values.pop(f"{prefix}id_tensor", None)
    constants = {"prior": (branches.out_channels, *branches.size), "avg_avg": branches.size}
    for constant, shape in constants.items():
        found = values.get(f"{prefix}{word}{constant}")
        if found is not None and tuple(found.shape) != shape:
            raise CheckpointError(f"{prefix}{word}{constant}: expected shape {shape}, received {tuple(found.shape)}")
    prior, average = (values.pop(f"{prefix}{word}{constant}", None) for constant in constants)
    own = {ours: values[theirs] for ours, theirs in names.items() if theirs in values}
    if not branches.point and "vector" in own and own["vector"].dim() == 2:
        own["vector"] = own["vector"][: len(branches.scales)]
    if {ours: tuple(value.shape) for ours, value in own.items()} == shapes:  # otherwise loading lists what is wrong
        rows = own["gconv_pw"].reshape(-1, branches.groups, *own["gconv_pw"].shape[1:])
        own["gconv_pw"] = rows.transpose(0, 1).reshape(own["gconv_pw"].shape)
        if average is not None:
            own["avg_conv"] = own["avg_conv"].double() * average.double().mean() * math.prod(branches.size)
        own |= _prior(own, branches, prior, later)
        if later:
            own |= {ours: own[ours].flip(2, 3) for ours in _WINDOWS}
        values.update({names[ours]: value for ours, value in own.items()})
    return {theirs: ours for ours, theirs in names.items()}


def _prior(own: dict[str, Tensor], branches: Branches, prior: Tensor | None, later: bool) -> dict[str, Tensor]:
    """What makes our cosines do what the original's prior does."""
    ours = branches.prior(torch.zeros((), dtype=torch.float64)).reshape(-1, *branches.size)
    theirs = ours if prior is None else prior.double().reshape(ours.shape)
    seen = theirs.flip(1, 2) if later else theirs
    sign = torch.where((seen * ours).flatten(1).sum(1) < 0, -1.0, 1.0)
    if torch.allclose(seen, sign.reshape(-1, 1, 1) * ours, rtol=0, atol=1e-6):
        return {"prior_conv": own["prior_conv"] * sign.reshape(-1, 1, 1, 1)}
    double = {name: value.double() for name, value in own.items()}
    kernel = double["vector"][2].reshape(-1, 1, 1, 1) * double["prior_conv"] * theirs.unsqueeze(1)
    kernel = kernel + branches.compose(double | {"prior_conv": torch.zeros_like(double["prior_conv"])})
    scales = torch.zeros_like(own["vector"])
    scales[0] = 1
    return {"weight": kernel, "vector": scales}


BLOCKS = Blocks(
    "OREPA",
    r"(?:weight\d+\.)?weight_orepa_origin|weight_or1x1_origin|weight0|rbr_dense\.weight_rbr_origin",
    _layer,
    folded=("orepa_reparam", "or1x1_reparam", "or_large_reparam", "rbr_reparam"),
)
