"""The loops of `foldconv.ops._cpu`, compiled on first use and kept in Numba's cache.

Each function returns the loop for one kernel size: sizes are constants, so that the inner loops unroll and become
vector instructions. A loop is run as thread `me` of `all`; which thread does what changes no result. Arrays of weights
are matrices: a row holds one output channel, pair after pair.

Loops that small layers use, too, take addresses of contiguous arrays: handing over an array takes ten times as long. No
loop closes over another: Numba would take it for a new function in every process, and compile it again.
"""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numba.extending
import numpy as np

# Sums may be reordered and contracted, but NaN and infinity stay what they are: a diverged run must show.
inlined = functools.partial(
    numba.njit,
    nogil=True,
    boundscheck=False,
    error_model="numpy",
    fastmath={"reassoc", "contract", "nsz"},
)
"""A part of loops: compiled with each of them, and kept with them."""


def compiled(loop: Callable[..., Any], *types: Any) -> Any:
    """The loop, compiled when it is called, and kept under a name of its own.

    Numba keeps all variants of a function behind one index, and numbers their files: of two processes that compile at
    once, one may find the other's machine code under its key, and so may what comes after one that was killed between
    index and file. So whatever changes the code is in the name, and each name has one variant and one content.

    Args:
        loop: closes over numbers and dtypes only, and is always called with arguments of the same types.
        types: what these depend on, where the loop does not close over it.
    """
    cells = [cell.cell_contents for cell in loop.__closure__ or ()]
    sources = [Path(name).read_bytes() for name in (__file__, loop.__code__.co_filename)]
    facts = [types, cells, sources, numba.__version__, numba.config.CPU_NAME, numba.config.CPU_FEATURES, _processor()]
    loop.__qualname__ += hashlib.sha256(repr(facts).encode()).hexdigest()[:20]
    return inlined(loop, cache=True)


@functools.cache
def _processor() -> str:
    return llvmlite.binding.get_host_cpu_name() + llvmlite.binding.get_host_cpu_features().flatten()


BLOCK = 64
"""Inputs whose sums stay in cache while the outputs pass by."""


@numba.extending.intrinsic
def _pointer(typing_context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], numba.core.cgutils.voidptr_t)

    return numba.types.voidptr(address), generate


def _padded(taps: int) -> int:
    return 1 << (taps - 1).bit_length()


@functools.cache
def chain(k: int, S: int, back: bool, dtype: Any) -> Any:
    """``kernel[o, i, m] = taps[o, i, m] + Σ_s D[c, m, s] · taps[o, i, s]``; c: the channel, that of o's group and i.

    With `back`, by ``D[c, s, m]``: for a gradient's way back, by the transpose.
    """
    P = _padded(k)
    shape = (S, k) if back else (k, S)

    def loop(me, all, taps_at, D_at, kernel_at, outputs, groups, inputs):
        weights = numba.carray(_pointer(taps_at), (outputs, inputs * S), dtype)
        D = numba.carray(_pointer(D_at), (groups * inputs, shape[0], shape[1]), dtype)
        kernels = numba.carray(_pointer(kernel_at), (outputs, inputs * k), dtype)
        # D and the identity, turned and padded, so that a row is a vector.
        table = np.zeros((groups * inputs, S, P), dtype)
        for c in range(groups * inputs):
            for s in range(S):
                for m in range(k):
                    table[c, s, m] = D[c, s, m] if back else D[c, m, s]
            for m in range(min(k, S)):
                table[c, m, m] += 1
        for o in range(outputs * me // all, outputs * (me + 1) // all):
            t = table[o // (outputs // groups) * inputs :]
            w, out = weights[o], kernels[o]
            for i in range(inputs - 1):
                for m in range(P):
                    a = t[i, 0, m] * w[i * S]
                    for s in range(1, S):
                        a += t[i, s, m] * w[i * S + s]
                    out[i * k + m] = a
            i = inputs - 1
            for m in range(k):
                a = t[i, 0, m] * w[i * S]
                for s in range(1, S):
                    a += t[i, s, m] * w[i * S + s]
                out[i * k + m] = a

    return compiled(loop)


@functools.cache
def outer(k: int, S: int, dtype: Any) -> Any:
    """``sums[chunk, g, i, m, s]``, to be summed over chunks: the sum over o of ``left[o, i, m] · right[o, i, s]``."""
    P = _padded(S)

    def loop(me, all, left_at, right_at, sums_at, outputs, groups, inputs, chunks):
        left = numba.carray(_pointer(left_at), (outputs, inputs * k), dtype)
        right = numba.carray(_pointer(right_at), (outputs, inputs * S), dtype)
        sums = numba.carray(_pointer(sums_at), (chunks, groups, inputs, k, S), dtype)
        outputs, blocks = outputs // groups, (inputs + BLOCK - 1) // BLOCK
        tasks = groups * blocks * chunks
        for task in range(tasks * me // all, tasks * (me + 1) // all):
            chunk, block, g = task % chunks, task // chunks % blocks, task // chunks // blocks
            start = block * BLOCK
            n = min(BLOCK, inputs - start)
            first, last = g * outputs + chunk * outputs // chunks, g * outputs + (chunk + 1) * outputs // chunks
            a = np.zeros((n, k, P), sums.dtype)
            # Four outputs at a time, so that a sum is read and written once for four products.
            fours = first + (last - first) // 4 * 4
            for o in range(first, fours, 4):
                l0, l1 = left[o, start * k :], left[o + 1, start * k :]
                l2, l3 = left[o + 2, start * k :], left[o + 3, start * k :]
                r0, r1 = right[o, start * S :], right[o + 1, start * S :]
                r2, r3 = right[o + 2, start * S :], right[o + 3, start * S :]
                for i in range(n - 1):
                    x, y, sum_ = i * k, i * S, a[i]
                    for s in range(P):
                        # Read before anything is written, or they would be read again for every m.
                        x0, x1, x2, x3 = r0[y + s], r1[y + s], r2[y + s], r3[y + s]
                        for m in range(k):
                            sum_[m, s] += l0[x + m] * x0 + l1[x + m] * x1 + l2[x + m] * x2 + l3[x + m] * x3
            # The last pair is not followed by one whose taps could be read along.
            for o in range(first, last):
                x, y = left[o, start * k :], right[o, start * S :]
                for i in range(n - 1 if o < fours else 0, n):
                    for m in range(k):
                        for s in range(S):
                            a[i, m, s] += x[i * k + m] * y[i * S + s]
            sums[chunk, g, start : start + n] = a[:, :, :S]

    return compiled(loop)


@functools.cache
def chain_last(S: int, dtype: Any) -> Any:
    """``kernel[o, m, i] = Σ_s table[g, m, s, i] · taps[o, s, i]``, input channels innermost."""

    def loop(me, all, taps, table, kernel):
        outputs, k, inputs = kernel.shape
        for o in range(outputs * me // all, outputs * (me + 1) // all):
            t, w = table[o // (outputs // table.shape[0])], taps[o]
            for m in range(k):
                for i in range(inputs):
                    a = t[m, 0, i] * w[0, i]
                    for s in range(1, S):
                        a += t[m, s, i] * w[s, i]
                    kernel[o, m, i] = a

    return compiled(loop, dtype)


@functools.cache
def outer_last(dtype: Any) -> Any:
    """``sums[chunk, g, m, s, i] = Σ_o left[o, m, i] · right[o, s, i]``, input channels innermost."""

    def loop(me, all, left, right, sums):
        chunks, groups, k, S, inputs = sums.shape
        outputs = left.shape[0] // groups
        tasks = chunks * groups
        for task in range(tasks * me // all, tasks * (me + 1) // all):
            g, chunk = task // chunks, task % chunks
            a = sums[chunk, g]
            a[:] = 0
            first, last = g * outputs + chunk * outputs // chunks, g * outputs + (chunk + 1) * outputs // chunks
            fours = first + (last - first) // 4 * 4
            for o in range(first, fours, 4):
                for m in range(k):
                    for s in range(S):
                        for i in range(inputs):
                            a[m, s, i] += (
                                left[o, m, i] * right[o, s, i]
                                + left[o + 1, m, i] * right[o + 1, s, i]
                                + left[o + 2, m, i] * right[o + 2, s, i]
                                + left[o + 3, m, i] * right[o + 3, s, i]
                            )
            for o in range(fours, last):
                for m in range(k):
                    for s in range(S):
                        for i in range(inputs):
                            a[m, s, i] += left[o, m, i] * right[o, s, i]

    return compiled(loop, dtype)
