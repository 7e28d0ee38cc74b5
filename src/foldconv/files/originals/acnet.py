"""Checkpoints of ACNets: DingXiaoH/ACNet, and the ``ACBlock`` of DingXiaoH/DiverseBranchBlock.

A block holds ``square_conv``, ``ver_conv`` (k×1) and ``hor_conv`` (1×k) with the norms ``square_bn``, ``ver_bn`` and
``hor_bn``; folded by the original's code it is the convolution ``fused_conv``. The plain network has a convolution and
its norm there.
"""

from __future__ import annotations

from ...methods import ACNet
from ._blocks import Blocks, as_named

_NAMES = {
    "square_conv": "body.main.conv",
    "square_bn": "body.main.norm",
    "ver_conv": "body.vertical.conv",
    "ver_bn": "body.vertical.norm",
    "hor_conv": "body.horizontal.conv",
    "hor_bn": "body.horizontal.norm",
}

BLOCKS = Blocks("ACNet", r"square_conv\.weight", as_named(ACNet(), _NAMES), folded=("fused_conv",))
