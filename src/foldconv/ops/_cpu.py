"""The path of the CPU: Numba kernels that pass over the weights once in each direction, in the convolution's layout.

A matrix product per input channel would need the weights with the output channel innermost, and the transposes cost
ten times the products. Here the taps of one (output, input) pair, which lie side by side, are one vector: each is
multiplied by the row of a small table that stays in cache. Vectors are padded to a power of two; what they write
beyond their end the next pair overwrites, and the last pair of a row is written alone. Weights in channels_last have
the input channel innermost: there it is the vector.

Sums run in an order that depends on shapes only, so results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedError, install
from ._buffers import SMALLEST, empty
from ._threads import LEAST_OF_TWO, run
from ._torch import shaped

name = "cpu"
MOST_TAPS = 32
"""More are unrolled into code that takes too long to compile."""
TASKS = 8
"""Enough tasks for the cores of a workstation."""
_OUTPUTS_PER_SUM = 32
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
_PROCESS = os.getpid()


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def least(*tensors: Tensor) -> int:
    """Loops are compiled once for each size and dtype, which takes seconds: for few weights only the usual ones.

    OREPA's serve all sizes.
    """
    if len(tensors) != 2:
        return 0
    is_usual = tensors[1].shape[1:] == (9, 9) and tensors[1].dtype == torch.float32
    return 0 if is_usual else 1 << 10


def reason_against(*tensors: Tensor) -> str | None:
    """Why this path cannot take these tensors."""
    first = tensors[0]
    if first.device.type != "cpu":
        return f"the tensors are on {first.device.type}"
    if first.dtype not in (torch.float32, torch.float64):
        return f"{first.dtype} is not compiled"
    if first.shape[-1] > MOST_TAPS:
        return f"more than {MOST_TAPS} taps are not compiled"
    if not _has_numba():
        return f"Numba is not installed ({install('cpu')})"
    if os.getpid() != _PROCESS:
        return "a forked process must not use the threads of its parent"
    return None


# ---------------------------------------------------------------------- DO-Conv


def depthwise(taps: Tensor, D: Tensor, groups: int) -> Tensor:
    """See `foldconv.ops.compose_depthwise`."""
    if not taps.is_contiguous():
        flat = _laid_out(taps.flatten(2))
        if not flat.is_contiguous():
            return shaped(_chain_last(flat, _with_identity(D), groups), taps)
        taps = taps.contiguous()
    return _chain(taps, D, groups, False)


def depthwise_gradients(grad: Tensor, taps: Tensor, D: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gradients of `taps` and `D`."""
    if not taps.is_contiguous():
        flat = _laid_out(taps.flatten(2))
        if not flat.is_contiguous():
            grad = _laid_out(grad.flatten(2), like=flat)
            d_taps = _chain_last(grad, _with_identity(D).transpose(1, 2), groups)
            return shaped(d_taps, taps), _outer_sums(grad, flat, groups)
        taps = taps.contiguous()
    grad = grad.contiguous()
    return _chain(grad, D, groups, True), _outer(grad, taps, D.shape[1], D.shape[2], groups)


def _chain(taps: Tensor, D: Tensor, groups: int, back: bool) -> Tensor:
    """``K[o, i, m] = taps[o, i, m] + Σ_s D[c, m, s] · taps[o, i, s]``, or by D's transpose; taps contiguous."""
    dtype, shape, D = taps.dtype, taps.shape, D.contiguous()
    k, multiplier = D.shape[1:]
    if back:
        k, multiplier = multiplier, k
    kernel = empty(shape if k == multiplier else (*shape[:2], k), dtype)
    at = taps.data_ptr(), D.data_ptr(), kernel.data_ptr()
    loop = _kernels().chain(k, multiplier, back, _NUMPY[dtype])
    run(loop, taps.numel(), *at, shape[0], groups, shape[1])
    return kernel


def _outer(left: Tensor, right: Tensor, k: int, multiplier: int, groups: int) -> Tensor:
    """``(G·I, k, S)``: the sum over outputs of ``left[o, i, m] · right[o, i, s]``; both contiguous."""
    out, per_group, *_ = left.shape
    chunks = _chunks(out, groups, per_group, k)
    sums = torch.empty(chunks * groups * per_group, k, multiplier, dtype=left.dtype, device="cpu")
    at = left.data_ptr(), right.data_ptr(), sums.data_ptr()
    run(_kernels().outer(k, multiplier, _NUMPY[left.dtype]), left.numel(), *at, out, groups, per_group, chunks)
    return sums if chunks == 1 else sums.view(chunks, -1, k, multiplier).sum(0)


class Small:
    """`depthwise` and its gradients for kernels like this one, with all that follows from shape and dtype found once.

    Of a small layer's step these few calls are what counts. Tensors that are laid out otherwise take the long way.
    """

    name = name

    def __init__(self, taps: Tensor, D: Tensor, groups: int):
        outputs, inputs = taps.shape[:2]
        k, dtype = D.shape[1], _NUMPY[taps.dtype]
        loops = _kernels()
        self._chain, self._back = loops.chain(k, k, False, dtype), loops.chain(k, k, True, dtype)
        self._outer = loops.outer(k, k, dtype)
        self._sizes = outputs, groups, inputs
        self._bytes = D.nbytes

    def depthwise(self, taps: Tensor, D: Tensor, groups: int) -> Tensor:
        """See `foldconv.ops.compose_depthwise`."""
        if not (taps.is_contiguous() and D.is_contiguous()):
            return depthwise(taps, D, groups)
        kernel = torch.empty_like(taps)
        self._chain(0, 1, taps.data_ptr(), D.data_ptr(), kernel.data_ptr(), *self._sizes)
        return kernel

    def depthwise_gradients(self, grad: Tensor, taps: Tensor, D: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The gradients of `taps` and `D`."""
        if not (grad.is_contiguous() and taps.is_contiguous() and D.is_contiguous()):
            return depthwise_gradients(grad, taps, D, groups)
        if taps.nbytes != grad.nbytes or D.nbytes != self._bytes or not (taps.is_cpu and D.is_cpu):
            raise UnsupportedError("weight, D: other tensors were put into them between the forward and the backward")
        d_taps, d_D = torch.empty_like(taps), torch.empty_like(D)
        at = grad.data_ptr()
        self._back(0, 1, at, D.data_ptr(), d_taps.data_ptr(), *self._sizes)
        self._outer(0, 1, at, taps.data_ptr(), d_D.data_ptr(), *self._sizes, 1)
        return d_taps, d_D


def small(taps: Tensor, D: Tensor, groups: int) -> Small | None:
    """For kernels whose loops take one thread and one chunk, and whose memory is not worth keeping."""
    is_small = taps.nbytes < SMALLEST and taps.numel() < LEAST_OF_TWO and D.shape[1] == D.shape[2]
    return Small(taps, D, groups) if is_small else None


def _with_identity(D: Tensor) -> Tensor:
    return D + torch.eye(*D.shape[1:], dtype=D.dtype)


def _chain_last(taps: Tensor, full: Tensor, groups: int) -> Tensor:
    """``K[o, i, m] = Σ_s full[c, m, s] · taps[o, i, s]``, the input channel innermost."""
    out, per_group, multiplier = taps.shape
    k = full.shape[1]
    table = full.reshape(groups, per_group, k, multiplier).permute(0, 2, 3, 1).contiguous()
    kernel = empty((out, k, per_group), taps.dtype)
    _run(_kernels().chain_last(multiplier, _NUMPY[taps.dtype]), taps.transpose(1, 2), table, kernel)
    return kernel.transpose(1, 2)


def _outer_sums(left: Tensor, right: Tensor, groups: int) -> Tensor:
    """``(G·I, k, S)``: the sum over outputs of ``left[o, i, m] · right[o, i, s]``; both in the same layout."""
    out, per_group, k = left.shape
    multiplier = right.shape[2]
    if right.is_contiguous():
        return _outer(left, right, k, multiplier, groups)
    chunks = _chunks(out, groups, per_group, k)
    sums = torch.empty(chunks, groups, k, multiplier, per_group, dtype=left.dtype, device="cpu")
    _run(_kernels().outer_last(_NUMPY[left.dtype]), left.transpose(1, 2), right.transpose(1, 2), sums)
    return _total(sums).permute(0, 3, 1, 2).reshape(groups * per_group, k, multiplier)


def _chunks(out: int, groups: int, per_group: int, k: int) -> int:
    """Sums over outputs are cut into as many chunks as make enough tasks; their number depends on the shape only."""
    if out * per_group * k < LEAST_OF_TWO:
        return 1
    tasks = groups * math.ceil(per_group / _kernels().BLOCK)
    return max(1, min(math.ceil(TASKS / tasks), out // groups // _OUTPUTS_PER_SUM))


def _total(sums: Tensor) -> Tensor:
    """The sum over chunks."""
    return sums[0] if len(sums) == 1 else sums.sum(0)


# ---------------------------------------------------------------------- layouts and threads


@functools.cache
def _kernels() -> Any:
    from . import _numba_kernels

    return _numba_kernels


def _laid_out(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Taps innermost, or the input channel innermost; copied if it is neither, or not as `like`."""
    if like is None:
        return tensor if tensor.is_contiguous() or tensor.transpose(1, 2).is_contiguous() else tensor.contiguous()
    return tensor.contiguous() if like.is_contiguous() else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _run(loop: Any, *tensors: Tensor) -> None:
    run(loop, tensors[0].numel(), *(t.numpy() for t in tensors))
