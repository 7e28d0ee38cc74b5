"""The loops of `foldconv.ops._orepa_cpu`; what is said at the top of `_numba_kernels.py` holds here, too.

OREPA has many taps and filters, so vectors run over the input channels: the rows of one output are turned that way in
buffers that stay in the cache. No size is a constant then, and each loop is compiled once for a dtype. Where the
product of the two stacked kernels is small it is computed there as well; else it comes from torch, turned already.
"""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from ._numba_kernels import BLOCK, _pointer, compiled, inlined


@functools.cache
def compose(dtype: Any) -> Any:
    """The kernel, ``(O, I, k)``, from the parameters as `OrepaParameters` has them; NumPy's dtype.

    `product_at`: of the two stacked kernels, ``(O, k, I)``; zero: computed here.
    """

    def loop(
        me, all, weight_at, average_at, prior_at, inner_at, second_at, point_at, depthwise_at, pointwise_at, scales_at,
        cosines_at, product_at, kernel_at, outputs, groups, inputs, width, k, T, centre,
    ):  # fmt: skip
        weight = numba.carray(_pointer(weight_at), (outputs, inputs * k), dtype)
        average = numba.carray(_pointer(average_at), (outputs, inputs), dtype)
        prior = numba.carray(_pointer(prior_at), (outputs, inputs), dtype)
        inner = numba.carray(_pointer(inner_at), (groups, width, inputs), dtype)
        second = numba.carray(_pointer(second_at), (outputs, width * k), dtype)
        point = numba.carray(_pointer(point_at), (outputs, inputs), dtype)
        depthwise = numba.carray(_pointer(depthwise_at), (groups, inputs, T * k), dtype)
        pointwise = numba.carray(_pointer(pointwise_at), (outputs, inputs * T), dtype)
        scales = numba.carray(_pointer(scales_at), (6, outputs), dtype)
        cosines = numba.carray(_pointer(cosines_at), (outputs, k), dtype)
        products = numba.carray(_pointer(product_at), (outputs, k, inputs), dtype)
        kernel = numba.carray(_pointer(kernel_at), (outputs, inputs * k), dtype)
        last, share = 5 if point_at else 4, dtype(1) / dtype(k)
        filters = _turned(depthwise)
        product, sums, q = np.empty((k, inputs), dtype), np.empty((k, inputs), dtype), np.empty((T, inputs), dtype)
        for o in range(outputs * me // all, outputs * (me + 1) // all):
            g = o // (outputs // groups)
            v0, v1, v2, v3, v5 = scales[0, o], scales[1, o] * share, scales[2, o], scales[3, o], scales[last, o]
            if product_at:
                product = products[o]
            else:
                s = second[o]
                for m in range(k):
                    for i in range(inputs):
                        product[m, i] = s[i * k + m]
                    for t in range(inputs, width):
                        product[m, t - inputs] += s[t * k + m]
                _add_product(product, s, inner[g])
            c, a, p = cosines[o], average[o], prior[o]
            for m in range(k):
                row, y, cosine = sums[m], product[m], v2 * c[m]
                for i in range(inputs):
                    row[i] = v3 * y[i] + v1 * a[i] + cosine * p[i]
            if point_at:
                v4, row, p = scales[4, o], sums[centre], point[o]
                for i in range(inputs):
                    row[i] += v4 * p[i]
            _turn(q, pointwise[o], v5)
            d = filters[g]
            for t in range(T):
                x = q[t]
                for m in range(k):
                    row, y = sums[m], d[t * k + m]
                    for i in range(inputs):
                        row[i] += x[i] * y[i]
            out, w = kernel[o], weight[o]
            for i in range(inputs):
                for m in range(k):
                    out[i * k + m] = v0 * w[i * k + m] + sums[m, i]

    return compiled(loop)


@functools.cache
def gradients(dtype: Any) -> Any:
    """The gradients of `compose`'s parameters.

    Without `turned_at` and `back_at` one thread does it all. With them the gradient is given turned, ``(O, k, I)``, and
    taken back through the 1×1, ``(O, k, width)``, its scale left out; the sums over outputs, which are the gradients of
    `inner` and `depthwise`, are not computed.
    """

    def loop(
        me, all, grad_at, weight_at, average_at, prior_at, inner_at, second_at, point_at, depthwise_at, pointwise_at,
        scales_at, cosines_at, turned_at, back_at, d_weight_at, d_average_at, d_prior_at, d_inner_at, d_second_at,
        d_point_at, d_depthwise_at, d_pointwise_at, d_scales_at, outputs, groups, inputs, width, k, T, centre,
    ):  # fmt: skip
        grad = numba.carray(_pointer(grad_at), (outputs, inputs * k), dtype)
        weight = numba.carray(_pointer(weight_at), (outputs, inputs * k), dtype)
        average = numba.carray(_pointer(average_at), (outputs, inputs), dtype)
        prior = numba.carray(_pointer(prior_at), (outputs, inputs), dtype)
        inner = numba.carray(_pointer(inner_at), (groups, width, inputs), dtype)
        second = numba.carray(_pointer(second_at), (outputs, width * k), dtype)
        point = numba.carray(_pointer(point_at), (outputs, inputs), dtype)
        depthwise = numba.carray(_pointer(depthwise_at), (groups, inputs, T * k), dtype)
        pointwise = numba.carray(_pointer(pointwise_at), (outputs, inputs * T), dtype)
        scales = numba.carray(_pointer(scales_at), (6, outputs), dtype)
        cosines = numba.carray(_pointer(cosines_at), (outputs, k), dtype)
        turned = numba.carray(_pointer(turned_at), (outputs, k, inputs), dtype)
        backs = numba.carray(_pointer(back_at), (outputs, k, width), dtype)
        d_weight = numba.carray(_pointer(d_weight_at), (outputs, inputs * k), dtype)
        d_average = numba.carray(_pointer(d_average_at), (outputs, inputs), dtype)
        d_prior = numba.carray(_pointer(d_prior_at), (outputs, inputs), dtype)
        d_inner = numba.carray(_pointer(d_inner_at), (groups, width, inputs), dtype)
        d_second = numba.carray(_pointer(d_second_at), (outputs, width * k), dtype)
        d_point = numba.carray(_pointer(d_point_at), (outputs, inputs), dtype)
        d_depthwise = numba.carray(_pointer(d_depthwise_at), (groups, inputs, T * k), dtype)
        d_pointwise = numba.carray(_pointer(d_pointwise_at), (outputs, inputs * T), dtype)
        d_scales = numba.carray(_pointer(d_scales_at), (6, outputs), dtype)
        last, share = 5 if point_at else 4, dtype(1) / dtype(k)
        filters = _turned(depthwise)
        back, y, q = np.empty((k, width), dtype), np.empty((k, inputs), dtype), np.empty((T, inputs), dtype)
        sums, turned_inner = np.empty((0, 0, 0), dtype), np.empty((0, 0, 0), dtype)
        if not turned_at:
            d_inner[:] = 0
            sums, turned_inner = np.zeros((groups, T * k, inputs), dtype), _turned(inner)
        for o in range(outputs * me // all, outputs * (me + 1) // all):
            g = o // (outputs // groups)
            v1, v2, v3, v5 = scales[1, o] * share, scales[2, o], scales[3, o], scales[last, o]

            flat, s, d_w, d_s = grad[o], second[o], d_weight[o], d_second[o]
            d_w[:] = flat
            d_scales[0, o] = _scaled(d_w, scales[0, o], weight[o])

            if turned_at:
                y, back = turned[o], backs[o]
            else:
                _turn(y, flat, dtype(1))
                for m in range(k):
                    back[m, :inputs] = y[m]
                    for t in range(inputs, width):
                        back[m, t] = y[m, t - inputs]
                _add_product(back, flat, turned_inner[g])
                _add_outer(d_inner[g], s, v3, y)
            for t in range(width):
                for m in range(k):
                    d_s[t * k + m] = back[m, t]
            d_scales[3, o] = _scaled(d_s, v3, s)

            c, d_a, d_p = cosines[o], d_average[o], d_prior[o]
            d_a[:] = 0
            d_p[:] = 0
            for m in range(k):
                row, cosine = y[m], c[m]
                for i in range(inputs):
                    d_a[i] += row[i]
                    d_p[i] += cosine * row[i]
            d_scales[1, o] = _scaled(d_a, v1, average[o]) * share
            d_scales[2, o] = _scaled(d_p, v2, prior[o])
            if point_at:
                d_point[o, :] = y[centre]
                d_scales[4, o] = _scaled(d_point[o], scales[4, o], point[o])

            d, d_q = filters[g], d_pointwise[o]
            q[:] = 0
            for t in range(T):
                row = q[t]
                for m in range(k):
                    x, f = y[m], d[t * k + m]
                    for i in range(inputs):
                        row[i] += x[i] * f[i]
            for i in range(inputs):
                for t in range(T):
                    d_q[i * T + t] = q[t, i]
            d_scales[last, o] = _scaled(d_q, v5, pointwise[o])
            if not turned_at:
                _turn(q, pointwise[o], v5)
                d = sums[g]
                for t in range(T):
                    f = q[t]
                    for m in range(k):
                        row, x = d[t * k + m], y[m]
                        for i in range(inputs):
                            row[i] += x[i] * f[i]
        if not turned_at:
            for g in range(groups):
                for i in range(inputs):
                    for n in range(T * k):
                        d_depthwise[g, i, n] = sums[g, n, i]

    return compiled(loop)


@functools.cache
def depthwise_gradient(dtype: Any) -> Any:
    """``sums[chunk, g, i, t, m]``, to be summed: of ``scales[o] · pointwise[o, i, t] · turned[o, m, i]``."""

    def loop(me, all, turned_at, pointwise_at, scales_at, sums_at, outputs, groups, inputs, k, T, chunks):
        turned = numba.carray(_pointer(turned_at), (outputs, k, inputs), dtype)
        pointwise = numba.carray(_pointer(pointwise_at), (outputs, inputs * T), dtype)
        scales = numba.carray(_pointer(scales_at), (outputs,), dtype)
        sums = numba.carray(_pointer(sums_at), (chunks, groups, inputs, T * k), dtype)
        outputs, blocks = outputs // groups, (inputs + BLOCK - 1) // BLOCK
        tasks = groups * blocks * chunks
        for task in range(tasks * me // all, tasks * (me + 1) // all):
            chunk, block, g = task % chunks, task // chunks % blocks, task // chunks // blocks
            start = block * BLOCK
            n = min(BLOCK, inputs - start)
            a, q = np.zeros((T * k, n), dtype), np.empty((T, n), dtype)
            for o in range(g * outputs + chunk * outputs // chunks, g * outputs + (chunk + 1) * outputs // chunks):
                _turn(q, pointwise[o, start * T : (start + n) * T], scales[o])
                for t in range(T):
                    f = q[t]
                    for m in range(k):
                        row, x = a[t * k + m], turned[o, m, start : start + n]
                        for i in range(n):
                            row[i] += x[i] * f[i]
            for i in range(n):
                for m in range(T * k):
                    sums[chunk, g, start + i, m] = a[m, i]

    return compiled(loop)


@inlined
def _turned(matrices):
    """A copy of each, transposed."""
    number, rows, columns = matrices.shape
    found = np.empty((number, columns, rows), matrices.dtype)
    for g in range(number):
        for r in range(rows):
            for c in range(columns):
                found[g, c, r] = matrices[g, r, c]
    return found


@inlined
def _turn(rows, flat, scale):
    """``rows[m, i] = scale · flat[i·k + m]``"""
    k, n = rows.shape
    for m in range(k):
        row = rows[m]
        for i in range(n):
            row[i] = scale * flat[i * k + m]


@inlined
def _scaled(gradient, scale, values):
    """Multiply a gradient by its branch's scale; returned is the scale's own gradient, ``Σ gradient · values``."""
    sum_ = gradient.dtype.type(0)
    for n in range(len(gradient)):
        sum_ += gradient[n] * values[n]
        gradient[n] *= scale
    return sum_


@inlined
def _add_product(rows, factors, matrix):
    """``rows[m, i] += Σ_t factors[t·k + m] · matrix[t, i]``, by four t: fewer reads of the rows."""
    k, n = rows.shape
    size = len(matrix)
    fours = size // 4 * 4
    for t in range(0, fours, 4):
        r0, r1, r2, r3 = matrix[t], matrix[t + 1], matrix[t + 2], matrix[t + 3]
        for m in range(k):
            at, row = t * k + m, rows[m]
            f0, f1, f2, f3 = factors[at], factors[at + k], factors[at + 2 * k], factors[at + 3 * k]
            for i in range(n):
                row[i] += f0 * r0[i] + f1 * r1[i] + f2 * r2[i] + f3 * r3[i]
    for t in range(fours, size):
        r0 = matrix[t]
        for m in range(k):
            row, f0 = rows[m], factors[t * k + m]
            for i in range(n):
                row[i] += f0 * r0[i]


@inlined
def _add_outer(sums, factors, scale, rows):
    """``sums[t, i] += scale · Σ_m factors[t·k + m] · rows[m, i]``, by three m, which divide most kernels' taps."""
    k, n = rows.shape
    threes = k // 3 * 3
    for t in range(len(sums)):
        a = sums[t]
        for m in range(0, threes, 3):
            at = t * k + m
            f0, f1, f2 = scale * factors[at], scale * factors[at + 1], scale * factors[at + 2]
            r0, r1, r2 = rows[m], rows[m + 1], rows[m + 2]
            for i in range(n):
                a[i] += f0 * r0[i] + f1 * r1[i] + f2 * r2[i]
        for m in range(threes, k):
            r0, f0 = rows[m], scale * factors[t * k + m]
            for i in range(n):
                a[i] += f0 * r0[i]
