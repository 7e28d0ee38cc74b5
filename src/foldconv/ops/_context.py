"""What surrounds a composition and decides about its path: a path that was asked for, and who looks on."""

from __future__ import annotations

import contextvars
import os

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

VARIABLE = "FOLDCONV_PATH"
asked_for: str | None = os.environ.get(VARIABLE) or None
"""The path of the whole process."""
forced_path: contextvars.ContextVar[str | None] = contextvars.ContextVar("path", default=asked_for)
"""Set by `foldconv.ops.using`."""


def is_recorded() -> bool:
    """Is a compiler, tracer or function transform looking at this forward? It should see how the kernel is made."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_observed() -> bool:
    """Is it recorded, or does a mode see each of torch's operations (a counter, a checkpoint's, one that fakes)?

    The same words again, for they run in every forward.
    """
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
