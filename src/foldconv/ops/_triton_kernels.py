"""The kernels of `foldconv.ops._gpu`, in Triton; the only module that imports it.

Terms as in `_torch`: a row is what one output channel reads, ``inputs`` pairs of some taps each; ``rows`` rows make a
group and share their table. Flat elements of a row lie side by side in memory and are spread over neighbouring threads;
which pair and tap an element is follows from its place, so no memory access is padded. Rows in channels_last (``LAST``)
have the input channel innermost, others the tap.

Sums run in the dtype of the weights, in an order that depends on shapes only; no atomics.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def elements(block, WIDE: tl.constexpr):
    """WIDE elements of a row, one for each thread.

    Told that they are neighbours, the compiler would give a thread four of them: one store for four, but then the
    threads of a warp read four times as far apart.
    """
    return tl.max_contiguous(block * WIDE + tl.arange(0, WIDE), 1)


@triton.jit
def pair_and_tap(element, inputs, TAPS: tl.constexpr, LAST: tl.constexpr):
    """Which pair and which tap an element of a row is."""
    if LAST:
        i, tap = element % inputs, element // inputs
    else:
        i, tap = element // TAPS, element % TAPS
    return i, tap


@triton.jit
def element_of(i, tap, inputs, TAPS: tl.constexpr, LAST: tl.constexpr):
    """Where in its row a pair's tap lies."""
    return tap * inputs + i if LAST else i * TAPS + tap


@triton.jit
def depthwise(
    taps, D, kernel, inputs, rows, blocks,
    K: tl.constexpr, S: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``kernel[o, i, m] = taps[o, i, m] + Σ_s D[c, m, s] · taps[o, i, s]``: ROWS rows, WIDE elements of each."""
    group = tl.program_id(0) // blocks
    element = elements(tl.program_id(0) % blocks, WIDE)
    i, m = pair_and_tap(element, inputs, K, LAST)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = element < inputs * K
    mask = (row < rows)[:, None] & inside[None, :]
    o = (group * rows + row)[:, None]

    source = taps + o * (inputs * S)
    d = D + ((group * inputs + i) * K + m) * S
    total = tl.load(source + element_of(i, m, inputs, S, LAST)[None, :], mask, 0)
    for s in range(S):
        x = tl.load(source + element_of(i, s, inputs, S, LAST)[None, :], mask, 0)
        total += x * tl.load(d + s, inside, 0)[None, :]
    tl.store(kernel + o * (inputs * K) + element[None, :], total, mask)


@triton.jit
def outer(
    grad, taps, table, d_taps, sums, scales, d_scales, inputs, rows, blocks, chunks,
    K: tl.constexpr, S: tl.constexpr, GRAD_LAST: tl.constexpr, LAST: tl.constexpr,
    OREPA: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of a product of `taps` with a `table`: WIDE elements of taps, a chunk of the group's outputs.

    ``d_taps[o, i, s] = v[o] · Σ_m table[c, m, s] · grad[o, i, m]``, ``sums[chunk, c, m, s] = Σ_o grad[o, i, m] ·
    v[o] · taps[o, i, s]``. DO-Conv: v is one, the table the identity plus D, ``(G·I, K, S)``; `sums` has its layout,
    or in channels_last ``(G, K, S, I)``. OREPA: v is in `scales`, the table ``(G·I, S, K)``, `sums` alike, and
    ``d_scales[block, o]`` the block's part of v's gradient.
    """
    group, block, chunk = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    element = elements(block, WIDE)
    i, s = pair_and_tap(element, inputs, S, LAST)
    inside = element < inputs * S
    m = tl.arange(0, PADDED)[:, None]
    mask = (m < K) & inside[None, :]
    channel = (group * inputs + i)[None, :]
    if OREPA:
        entry = (channel * S + s[None, :]) * K + m
        t = tl.load(table + entry, mask, 0)
        end = entry
    else:
        entry = (channel * K + m) * S + s[None, :]
        t = tl.load(table + entry, mask, 0) + tl.where(m == s[None, :], 1.0, 0.0).to(table.dtype.element_ty)
        end = entry
        if LAST:
            end = (group * K + m) * (inputs * S) + element[None, :]

    # A thread shall hold all taps that are summed over, so that the sum needs no exchange; that they are neighbours in
    # memory would tempt the compiler to spread them over threads.
    q_place = tl.max_contiguous(element_of(i[None, :], m, inputs, K, GRAD_LAST), [1, 1])
    first, last = rows * chunk // chunks, rows * (chunk + 1) // chunks
    o = group * rows + first
    x = tl.load(taps + o * (inputs * S) + element, inside, 0)
    q = tl.load(grad + o * (inputs * K) + q_place, mask, 0)
    total = tl.zeros([PADDED, WIDE], q.dtype)
    for row in range(first, last):
        # What the next round needs is under way while this one computes; the last reads its own again.
        after = group * rows + tl.minimum(row + 1, last - 1)
        x_after = tl.load(taps + after * (inputs * S) + element, inside, 0)
        q_after = tl.load(grad + after * (inputs * K) + q_place, mask, 0)
        o = group * rows + row
        y = tl.sum(t * q, 0)
        if OREPA:
            v = tl.load(scales + o)
            tl.store(d_scales + block * (tl.num_programs(0) // blocks * rows) + o, tl.sum(x * y, 0))
            x, y = v * x, v * y
        tl.store(d_taps + o * (inputs * S) + element, y, inside)
        total += q * x[None, :]
        x, q = x_after, q_after
    size = tl.num_programs(0) // blocks * inputs * (K * S)
    tl.store(sums + chunk * size + end, total, mask)


@triton.jit
def orepa(
    weight, average, prior, product, point, pointwise, depthwise, scales, cosines, kernel,
    inputs, outputs, rows, blocks, product_o, product_i, product_m,
    K: tl.constexpr, T: tl.constexpr, CENTRE: tl.constexpr, POINT: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sum of OREPA's scaled branches: ROWS rows, WIDE elements of each; `product` with its strides."""
    group = tl.program_id(0) // blocks
    element = elements(tl.program_id(0) % blocks, WIDE)
    i, m = pair_and_tap(element, inputs, K, LAST)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = element < inputs * K
    live = row < rows
    mask = live[:, None] & inside[None, :]
    o = group * rows + row
    pair = o[:, None] * inputs + i[None, :]
    place = o[:, None] * (inputs * K) + element[None, :]

    d = depthwise + (group * inputs + i) * (T * K) + m
    total = tl.zeros([ROWS, WIDE], weight.dtype.element_ty)
    for t in range(T):
        total += tl.load(pointwise + pair * T + t, mask, 0) * tl.load(d + t * K, inside, 0)[None, :]
    total *= tl.load(scales + (4 + POINT) * outputs + o, live, 0)[:, None]
    total += tl.load(scales + o, live, 0)[:, None] * tl.load(weight + place, mask, 0)
    total += tl.load(scales + outputs + o, live, 0)[:, None] * (tl.load(average + pair, mask, 0) / K)
    cosine = tl.load(cosines + o[:, None] * K + m[None, :], mask, 0)
    total += tl.load(scales + 2 * outputs + o, live, 0)[:, None] * tl.load(prior + pair, mask, 0) * cosine
    y = tl.load(product + o[:, None] * product_o + i[None, :] * product_i + m[None, :] * product_m, mask, 0)
    total += tl.load(scales + 3 * outputs + o, live, 0)[:, None] * y
    if POINT:
        centre = tl.load(point + pair, mask & (m == CENTRE)[None, :], 0)
        total += tl.load(scales + 4 * outputs + o, live, 0)[:, None] * centre
    tl.store(kernel + place, total, mask)


@triton.jit
def orepa_rows(
    grad, weight, average, prior, product, point, scales, cosines,
    d_weight, d_average, d_prior, d_product, d_point, d_scales,
    inputs, outputs, product_o, product_i, product_m,
    K: tl.constexpr, CENTRE: tl.constexpr, POINT: tl.constexpr,
    LAST: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of all of `orepa`'s inputs but the depthwise branch: one row, WIDE pairs at a time."""
    o = tl.program_id(0)
    m = tl.arange(0, PADDED)[:, None]
    v0, v1 = tl.load(scales + o), tl.load(scales + outputs + o) / K
    v2, v3 = tl.load(scales + 2 * outputs + o), tl.load(scales + 3 * outputs + o)
    cosine = tl.load(cosines + o * K + m, m < K, 0)
    s0 = tl.zeros([PADDED, WIDE], v0.dtype)
    s3 = tl.zeros([PADDED, WIDE], v0.dtype)
    s1 = tl.zeros([WIDE], v0.dtype)
    s2 = tl.zeros([WIDE], v0.dtype)
    s4 = tl.zeros([WIDE], v0.dtype)
    for start in range(0, inputs, WIDE):
        i = start + tl.arange(0, WIDE)
        inside = i < inputs
        mask = (m < K) & inside[None, :]
        place = o * (inputs * K) + element_of(i[None, :], m, inputs, K, LAST)
        product_place = o * product_o + i[None, :] * product_i + m * product_m
        pair = o * inputs + i

        q = tl.load(grad + place, mask, 0)
        s0 += q * tl.load(weight + place, mask, 0)
        s3 += q * tl.load(product + product_place, mask, 0)
        tl.store(d_weight + place, v0 * q, mask)
        tl.store(d_product + product_place, v3 * q, mask)
        mean, turned = tl.sum(q, 0), tl.sum(q * cosine, 0)
        s1 += mean * tl.load(average + pair, inside, 0)
        s2 += turned * tl.load(prior + pair, inside, 0)
        tl.store(d_average + pair, v1 * mean, inside)
        tl.store(d_prior + pair, v2 * turned, inside)
        if POINT:
            middle = tl.load(grad + o * (inputs * K) + element_of(i, CENTRE, inputs, K, LAST), inside, 0)
            s4 += middle * tl.load(point + pair, inside, 0)
            tl.store(d_point + pair, tl.load(scales + 4 * outputs + o) * middle, inside)
    tl.store(d_scales + o, tl.sum(tl.sum(s0, 0), 0))
    tl.store(d_scales + outputs + o, tl.sum(s1, 0) / K)
    tl.store(d_scales + 2 * outputs + o, tl.sum(s2, 0))
    tl.store(d_scales + 3 * outputs + o, tl.sum(tl.sum(s3, 0), 0))
    if POINT:
        tl.store(d_scales + 4 * outputs + o, tl.sum(s4, 0))
