"""The path of the GPU: Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

name = "gpu"


def reason_against(*tensors: Tensor) -> str | None:
    """Why this path cannot take these tensors."""
    return f"the tensors are on {tensors[0].device.type}"


depthwise: Any = None
depthwise_gradients: Any = None
orepa: Any = None
orepa_gradients: Any = None
