"""Checkpoints of DingXiaoH/DiverseBranchBlock, and of DBB networks trained with JUGGHM/OREPA_CVPR2022.

A block holds ``dbb_origin``, ``dbb_1x1``, ``dbb_avg`` and ``dbb_1x1_kxk``; depthwise blocks have no ``dbb_1x1`` and no
convolution in ``dbb_avg``. The first convolution of ``dbb_1x1_kxk`` is ``idconv1`` (stored as what it adds to an
identity) when it is as wide as the input, else ``conv1``. Folded by the original's code it is the convolution
``dbb_reparam``. The plain network has a convolution and its norm there, in the zoo's ``orepa_resnet*`` called ``conv``
and ``bn``.

The same function and gradients in both modes: the norms before a padding pad with what they make of zero, and that
value has no gradient, in the original as here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ...methods import DBB
from ._blocks import Blocks, Layer

_NAMES = {
    "dbb_origin.conv": "body.main.conv",
    "dbb_origin.bn": "body.main.norm",
    "dbb_1x1.conv": "body.point.conv",
    "dbb_1x1.bn": "body.point.norm",
    "dbb_avg.conv": "body.average.conv",
    "dbb_avg.bn.bn": "body.average.norm_and_pad.norm",
    "dbb_avg.avgbn": "body.average.norm",
    "dbb_1x1_kxk.idconv1": "body.stack.first.conv",
    "dbb_1x1_kxk.conv1": "body.stack.first",
    "dbb_1x1_kxk.bn1.bn": "body.stack.norm_and_pad.norm",
    "dbb_1x1_kxk.conv2": "body.stack.second",
    "dbb_1x1_kxk.bn2": "body.stack.norm",
}


def _layer(tensors: dict[str, Tensor], conv: Any) -> Layer:
    inner = tensors.get("dbb_1x1_kxk.bn1.bn.weight")
    if inner is None or inner.dim() != 1:
        raise CheckpointError("its dbb_1x1_kxk.bn1.bn.weight, which tells the internal width, is missing or no vector")
    default = conv.in_channels * (2 if conv.groups == conv.out_channels else 1)
    return Layer(DBB(None if len(inner) == default else len(inner)), _NAMES, tensors)


BLOCKS = Blocks("DBB", r"dbb_origin\.conv\.weight", _layer, folded=("dbb_reparam",))
