"""The loop of `foldconv.ops._depthwise`; see `_numba_kernels.py` for how loops are written."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ._numba_kernels import compiled

CHANNELS = 128
"""Channels whose sums stay in cache."""


@functools.cache
def weight_gradient(dtype: Any) -> Any:
    """``sums[c, i, j] = Σ g[n, h, w, c] · x[n, h·stride + i·dilation - padding, w·stride + ..., c]``, flat arrays."""

    def loop(me, all, g, x, sums, sizes, stride, padding, dilation):
        batch, rows, columns, height, width, channels, high, wide = sizes
        blocks = (channels + CHANNELS - 1) // CHANNELS
        for block in range(blocks * me // all, blocks * (me + 1) // all):
            start = block * CHANNELS
            many = min(CHANNELS, channels - start)
            a = np.zeros((high * wide, many), sums.dtype)
            for n in range(batch):
                for h in range(rows):
                    for i in range(high):
                        y = h * stride[0] + i * dilation[0] - padding[0]
                        if y < 0 or y >= height:
                            continue
                        for j in range(wide):
                            begin = j * dilation[1] - padding[1]
                            first = 0 if begin >= 0 else (-begin + stride[1] - 1) // stride[1]
                            last = min(columns, (width - 1 - begin) // stride[1] + 1)
                            into, step = a[i * wide + j], stride[1] * channels
                            p = ((n * rows + h) * columns + first) * channels + start
                            q = ((n * height + y) * width + first * stride[1] + begin) * channels + start
                            # Four positions at a time, so that a sum is read and written once for four products.
                            for _ in range((last - first) // 4):
                                g0, g1 = g[p : p + many], g[p + channels : p + channels + many]
                                g2, g3 = g[p + 2 * channels :], g[p + 3 * channels :]
                                x0, x1 = x[q : q + many], x[q + step : q + step + many]
                                x2, x3 = x[q + 2 * step :], x[q + 3 * step :]
                                for c in range(many):
                                    into[c] += g0[c] * x0[c] + g1[c] * x1[c] + g2[c] * x2[c] + g3[c] * x3[c]
                                p += 4 * channels
                                q += 4 * step
                            for _ in range((last - first) % 4 if last > first else 0):
                                g0, x0 = g[p : p + many], x[q : q + many]
                                for c in range(many):
                                    into[c] += g0[c] * x0[c]
                                p += channels
                                q += step
            for c in range(many):
                sums[(start + c) * high * wide : (start + c + 1) * high * wide] = a[:, c]

    return compiled(loop, dtype)
