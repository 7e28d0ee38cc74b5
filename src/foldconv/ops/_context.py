"""What surrounds a composition and decides about its path: a path that was asked for, and who looks on."""

from __future__ import annotations

import contextvars

import torch

forced_path: contextvars.ContextVar[str | None] = contextvars.ContextVar("path", default=None)
"""Set by `foldconv.ops.using`."""


def is_recorded() -> bool:
    """Is a compiler, tracer or function transform looking at this forward? It should see how the kernel is made."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_observed() -> bool:
    """Is this forward recorded, or does a mode see each of torch's operations (a counter, a fake, a checkpoint's)?"""
    return is_recorded() or torch._C._len_torch_dispatch_stack() > 0
