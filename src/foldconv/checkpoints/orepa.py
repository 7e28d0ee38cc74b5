"""Checkpoints of JUGGHM/OREPA_CVPR2022: its OREPA blocks (type ``OREPA``).

Four kinds of block, each with a norm ``bn``; the plain network has a convolution and its norm there, in the zoo's
``orepa_resnet*`` called ``conv`` and ``bn``:

    OREPA            k×k, ``weight_orepa_*`` and ``vector``
    OREPA_1x1        ``weight_or1x1_*`` and ``vector``
    LargeConv        7×7 and larger, a chain of OREPA kernels ``weight0``, ``weight1``, ...
    LargeConvBase    the same of plain kernels

Folded by the original's code it is the convolution ``orepa_reparam``, ``or1x1_reparam`` or ``or_large_reparam``.

What differs from ours, and is converted:

* chains: the original omits the flip of the later kernels, so those are flipped here, and its function stays;
* ``gconv_pw`` with groups: the original reads the rows with the group as the inner index;
* the average: a single-precision 1/k², whose rounding goes into ``avg_conv``;
* ``weight_orepa_prior``: left out where it is the paper's cosines, up to the sign that flipping gives them. Otherwise
  (odd widths in a chain, kernels other than 3×3, for which the original leaves it uninitialized) the kernel is imported
  composed: it becomes ``weight``, the scales of the other branches 0.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ..methods import OREPA
from ..methods._orepa_branches import Branches
from ._blocks import NORM, Blocks, Layer

_KERNEL = {
    "weight_orepa_origin": "weight",
    "weight_orepa_avg_conv": "avg_conv",
    "weight_orepa_pfir_conv": "prior_conv",
    "weight_orepa_1x1_kxk_idconv1": "kxk_idconv1",
    "weight_orepa_1x1_kxk_conv2": "kxk_conv2",
    "weight_orepa_1x1": "conv_1x1",
    "weight_orepa_gconv_dw": "gconv_dw",
    "weight_orepa_gconv_pw": "gconv_pw",
    "vector": "vector",
}
_POINTWISE = {
    "weight_or1x1_origin": "weight",
    "weight_or1x1_l2i_conv1": "l2i_conv1",
    "weight_or1x1_l2i_conv2": "l2i_conv2",
    "vector": "vector",
}
_CONSTANTS = ("weight_orepa_prior", "weight_orepa_avg_avg", "id_tensor")
_WINDOWS = ("weight_orepa_origin", "weight_orepa_1x1_kxk_conv2", "weight_orepa_gconv_dw")


def _layer(tensors: dict[str, Tensor], conv: Any) -> Layer:
    if "weight_or1x1_origin" in tensors:
        return Layer(OREPA(), {**_POINTWISE, "bn": NORM}, tensors)
    stages = {match[1]: match[0] for key in tensors if (match := re.match(r"weight(\d+)(?=\.|$)", key))}
    if not stages:
        branches = Branches(conv.in_channels, conv.out_channels, tuple(conv.kernel_size), conv.groups)
        return Layer(OREPA(), {**_KERNEL, "bn": NORM}, _kernel(tensors, branches, later=False))
    plain = "weight0" in tensors
    names, values = {"bn": NORM}, {key: value for key, value in tensors.items() if not key.startswith("weight")}
    for number, stage in stages.items():
        first, prefix = number == "0", f"{stage}."
        if plain:
            names[stage], values[stage] = stage, tensors[stage] if first else tensors[stage].flip(2, 3)
            continue
        names |= {f"{prefix}{theirs}": f"{ours}{number}" for theirs, ours in _KERNEL.items()}
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        branches = Branches(conv.in_channels if first else conv.out_channels, conv.out_channels, (3, 3), conv.groups)
        values |= {f"{prefix}{key}": value for key, value in _kernel(own, branches, later=not first).items()}
    return Layer(OREPA(large="plain" if plain else "orepa"), names, values)


def _kernel(tensors: dict[str, Tensor], branches: Branches, later: bool) -> dict[str, Tensor]:
    """One OREPA kernel without its constants; `later`: behind another one in a chain."""
    values = {key: value for key, value in tensors.items() if key not in _CONSTANTS}
    wanted = branches.shapes()
    if any(theirs not in values or values[theirs].shape != wanted[ours] for theirs, ours in _KERNEL.items()):
        return values  # loading will list what is wrong
    pointwise = values["weight_orepa_gconv_pw"]
    rows = pointwise.reshape(-1, branches.groups, *pointwise.shape[1:])
    values["weight_orepa_gconv_pw"] = rows.transpose(0, 1).reshape(pointwise.shape)
    if "weight_orepa_avg_avg" in tensors:
        share = tensors["weight_orepa_avg_avg"].double().mean() * math.prod(branches.size)
        values["weight_orepa_avg_conv"] = values["weight_orepa_avg_conv"].double() * share
    ours = branches.prior(torch.zeros((), dtype=torch.float64)).reshape(-1, *branches.size)
    prior = tensors.get("weight_orepa_prior", ours).double()
    seen = prior.flip(1, 2) if later else prior
    sign = torch.where((seen * ours).flatten(1).sum(1) < 0, -1.0, 1.0).double().reshape(-1, 1, 1)
    if torch.allclose(seen, sign * ours, rtol=0, atol=1e-6):
        values["weight_orepa_pfir_conv"] = values["weight_orepa_pfir_conv"] * sign.float().reshape(-1, 1, 1, 1)
    else:
        values |= _composed(values, branches, prior)
    return values | ({key: values[key].flip(2, 3) for key in _WINDOWS} if later else {})


def _composed(values: dict[str, Tensor], branches: Branches, prior: Tensor) -> dict[str, Tensor]:
    """The kernel as its own origin branch, the others without a scale."""
    own = {ours: values[theirs].double() for theirs, ours in _KERNEL.items()}
    theirs = own["vector"][2].reshape(-1, 1, 1, 1) * own["prior_conv"] * prior.unsqueeze(1)
    own["prior_conv"] = torch.zeros_like(own["prior_conv"])
    scales = torch.zeros_like(values["vector"])
    scales[0] = 1
    return {"weight_orepa_origin": branches.compose(own) + theirs, "vector": scales}


BLOCKS = Blocks(
    "OREPA",
    r"(?:weight\d+\.)?weight_orepa_origin|weight_or1x1_origin|weight0",
    _layer,
    folded=("orepa_reparam", "or1x1_reparam", "or_large_reparam"),
)
