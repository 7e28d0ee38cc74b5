"""Memory for large results on the CPU that comes back when nobody holds the tensor any more.

A kernel and its gradient are made anew in every step. Fresh memory is memory that the system must first clear, page
by page, which takes longer than computing what is written there; so it is kept. NumPy owns the memory, a torch tensor
borrows it, and when the last tensor that shares it dies, torch drops the array and the memory returns here.
"""

from __future__ import annotations

import collections
import math
import weakref

import numpy as np
import torch
from torch import Tensor

MOST_KEPT = 1 << 29
"""Bytes that may lie here unused; more is given back to the system."""
SMALLEST = 1 << 18
"""Bytes below which memory is not worth keeping."""
ALIGNMENT = 64
"""Bytes of a cache line, to which torch aligns its own memory."""
_TYPES = {torch.float32: np.float32, torch.float64: np.float64}

_idle: dict[int, list[np.ndarray]] = collections.defaultdict(list)
_loans: dict[int, tuple[weakref.ref, np.ndarray]] = {}
_kept = 0


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU with arbitrary contents, as ``torch.empty``; float32 or float64."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default device is
    global _kept
    idle = _idle[size]
    if idle:
        memory = idle.pop()
        _kept -= size
    else:
        memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
        offset = -memory.ctypes.data % ALIGNMENT
        memory = memory[offset : offset + size]
    borrowed = memory.view(_TYPES[dtype]).reshape(shape)
    loan = weakref.ref(borrowed, _give_back)
    _loans[id(loan)] = loan, memory
    return torch.from_numpy(borrowed)


def _give_back(loan: weakref.ref) -> None:
    global _kept
    memory = _loans.pop(id(loan))[1]
    if _kept + memory.nbytes <= MOST_KEPT:
        _idle[memory.nbytes].append(memory)
        _kept += memory.nbytes


def release() -> int:
    """Give all unused memory back to the system; the number of bytes."""
    global _kept
    size, _kept = _kept, 0
    _idle.clear()
    return size
