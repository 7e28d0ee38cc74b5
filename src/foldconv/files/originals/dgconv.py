"""Checkpoints of d-li14/dgconv.pytorch.

A layer holds its convolution ``conv``, its gates ``gate``, and two constants ``D`` and ``I``; the plain network has a
convolution there, as the zoo's ``g_resnext*`` have. Whether a layer sorts its gates is no part of a checkpoint: those
of the published networks do not; for others pass ``sort=True``.

A gate of exactly 0 is half open in the original, by the sign of zero; such a mask is none of the paper's, and refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ...methods import DGConv
from ._blocks import Blocks, Layer

_NAMES = {"gate": "gates", "conv.weight": "weight", "conv.bias": "bias"}


def _layer(tensors: dict[str, Tensor], conv: Any) -> Layer:
    if not tensors["gate"].all():
        raise CheckpointError("a gate is exactly 0, which the original half opens; expected gates of either sign")
    return Layer(DGConv(), _NAMES, {key: value for key, value in tensors.items() if key not in ("D", "I")})


BLOCKS = Blocks("DGConv", "gate", _layer, takes_norm=False)
