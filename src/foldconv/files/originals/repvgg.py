"""Checkpoints of DingXiaoH/RepVGG, and of RepVGG networks trained with JUGGHM/OREPA_CVPR2022.

A block holds ``rbr_dense`` and ``rbr_1x1`` (``conv`` and ``bn`` each) and, where it has an identity, the norm
``rbr_identity``; folded by the original's code it is the convolution ``rbr_reparam``. The plain network has a
convolution and its norm there; the zoo's ``plain_repvgg_*`` call them ``conv`` and ``bn``.
"""

from __future__ import annotations

from ...methods import RepVGG
from ._blocks import Blocks, as_named

_NAMES = {
    "rbr_dense.conv": "body.main.conv",
    "rbr_dense.bn": "body.main.norm",
    "rbr_1x1.conv": "body.point.conv",
    "rbr_1x1.bn": "body.point.norm",
    "rbr_identity": "body.identity.0",
}

BLOCKS = Blocks("RepVGG", r"rbr_dense\.conv\.weight", as_named(RepVGG(), _NAMES), folded=("rbr_reparam",))
