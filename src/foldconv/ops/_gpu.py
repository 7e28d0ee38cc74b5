"""The path of the GPU: Triton kernels that pass over the weights once, in the convolution's own layout.

A composition is small beside the convolution that uses it, so what it costs is launches and passes over memory. By
torch's operations it takes a dozen of each per layer and direction; here it is one launch forward, and backward one
for DO-Conv and two for OREPA, plus the sum of a few partial results.

Gradients of what all outputs share are sums over outputs. These are cut into chunks, so that there is work for every
multiprocessor; each chunk is summed by one program and torch adds the chunks. Their number depends on shapes only and
there are no atomics, so results are the same in every run.

Under `torch.compile` the layers take torch's operations instead: inductor sees the formula and fuses it with what
surrounds it, which it could not do with a launch of ours.

Nothing here waits for the GPU or asks it anything, so a training step can be captured as a CUDA graph; run it once
before, for kernels are compiled when they are first used.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._context import forced_path
from ._torch import Orepa, shaped

name = "gpu"
LEAST_CAPABILITY = (8, 0)
"""What Triton says it needs."""
PROGRAMS = 264
"""Two for each multiprocessor of the largest GPUs: with fewer, some would idle."""
_THREADS = 128
_OUTPUTS_PER_SUM = 8
_INDICES = 2**31


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def least(*tensors: Tensor) -> int:
    """It always gains, since small layers cost launches only."""
    return 0


def reason_against(*tensors: Tensor) -> str | None:
    """Why this path cannot take these tensors."""
    first = tensors[0]
    if first.device.type != "cuda" and not (first.device.type == "cpu" and _is_interpreted()):
        return f"the tensors are on {first.device.type}"
    if torch.version.hip is not None:
        return "its kernels were not tried on ROCm"
    if first.dtype not in (torch.float32, torch.float64):
        return f"{first.dtype} has no kernels"
    if max(t.numel() for t in tensors) >= _INDICES:
        return "a tensor has 2³¹ elements or more"
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if first.device.type == "cuda" and _capability(first.device.index) < LEAST_CAPABILITY:
        return f"the GPU's compute capability is below {'.'.join(map(str, LEAST_CAPABILITY))}"
    return None


def _is_interpreted() -> bool:
    """May tensors be on the CPU? With Triton's interpreter, which is for tests, and only where this path is forced."""
    return os.environ.get("TRITON_INTERPRET") == "1" and forced_path.get() == name


# ---------------------------------------------------------------------- DO-Conv


def depthwise(taps: Tensor, D: Tensor, groups: int) -> Tensor:
    """See `foldconv.ops.compose_depthwise`."""
    like = taps
    taps, last = _laid_out(taps.flatten(2))
    out, per_group, multiplier = taps.shape
    k = D.shape[1]
    kernel = _empty(taps, k, last)
    tile = _tile_of_rows(groups, out // groups, per_group * k, most=16)
    _launch(
        _kernels().depthwise, tile, taps, D.contiguous(), kernel, per_group, out // groups, tile.blocks,
        K=k, S=multiplier, LAST=last, ROWS=tile.rows, WIDE=tile.wide,
    )  # fmt: skip
    return shaped(kernel, like)


def depthwise_gradients(grad: Tensor, taps: Tensor, D: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gradients of `taps` and `D`."""
    like = taps
    taps, last = _laid_out(taps.flatten(2))
    grad = _as(grad.flatten(2), last)
    out, per_group, multiplier = taps.shape
    k = D.shape[1]
    d_taps = _empty(taps, multiplier, last)
    tile = _tile_of_chunks(groups, out // groups, per_group * multiplier, k)
    shape = (groups, k, multiplier, per_group) if last else (groups * per_group, k, multiplier)
    sums = taps.new_empty(tile.chunks, *shape)
    _launch(
        _kernels().outer, tile, grad, taps, D.contiguous(), d_taps, sums, sums, sums,
        per_group, out // groups, tile.blocks, tile.chunks,
        K=k, S=multiplier, GRAD_LAST=last, LAST=last, OREPA=False, PADDED=_padded(k), WIDE=tile.wide,
    )  # fmt: skip
    d_D = _total(sums)
    return shaped(d_taps, like), d_D.permute(0, 3, 1, 2).reshape(D.shape) if last else d_D


# ---------------------------------------------------------------------- OREPA


def orepa(p: Orepa, groups: int) -> Tensor:
    """See `foldconv.ops.compose_orepa`."""
    weight, last = _laid_out(p.weight)
    out, per_group, k = weight.shape
    kernel = _empty(weight, k, last)
    tile = _tile_of_rows(groups, out // groups, per_group * k, most=8)
    pointwise, depthwise, scales, cosines = (t.contiguous() for t in (p.pointwise, p.depthwise, p.scales, p.cosines))
    _launch(
        _kernels().orepa, tile, weight, *_pairs(p, 0), p.product, *_pairs(p, 1), pointwise, depthwise, scales, cosines,
        kernel, per_group, out, out // groups, tile.blocks, *p.product.stride(),
        K=k, T=pointwise.shape[2], CENTRE=p.centre, POINT=p.point is not None,
        LAST=last, ROWS=tile.rows, WIDE=tile.wide,
    )  # fmt: skip
    return kernel


def orepa_gradients(grad: Tensor, p: Orepa, groups: int) -> Orepa:
    """The gradient of every field but the cosines."""
    weight, last = _laid_out(p.weight)
    grad = _as(grad, last)
    out, per_group, k = weight.shape
    filters = p.pointwise.shape[2]
    scales, pointwise = p.scales.contiguous(), p.pointwise.contiguous()
    d_product = torch.empty_like(p.product)
    product = p.product if d_product.stride() == p.product.stride() else p.product.contiguous()
    found = p._replace(
        weight=_empty(weight, k, last),
        average=grad.new_empty(out, per_group),
        prior=grad.new_empty(out, per_group),
        product=d_product,
        point=None if p.point is None else grad.new_empty(out, per_group),
        pointwise=torch.empty_like(pointwise),
        scales=torch.empty_like(scales),
    )

    wide = min(_padded(per_group), max(1, 8 * _THREADS // _padded(k)))
    rows = _Tile(out, 1, wide, max(1, min(_THREADS, wide * _padded(k) // 8) // 32))
    _launch(
        _kernels().orepa_rows, rows,
        grad, weight, *_pairs(p, 0), product, *_pairs(p, 1), scales, p.cosines.contiguous(),
        found.weight, *_pairs(found, 0), d_product, *_pairs(found, 1), found.scales,
        per_group, out, *d_product.stride(),
        K=k, CENTRE=p.centre, POINT=p.point is not None, LAST=last, PADDED=_padded(k), WIDE=wide,
    )  # fmt: skip

    tile = _tile_of_chunks(groups, out // groups, per_group * filters, k)
    sums = grad.new_empty(tile.chunks, *p.depthwise.shape)
    of_scale = found.scales[-1:] if tile.blocks == 1 else grad.new_empty(tile.blocks, out)
    _launch(
        _kernels().outer, tile, grad, pointwise, p.depthwise.contiguous(), found.pointwise, sums, scales[-1], of_scale,
        per_group, out // groups, tile.blocks, tile.chunks,
        K=k, S=filters, GRAD_LAST=last, LAST=False, OREPA=True, PADDED=_padded(k), WIDE=tile.wide,
    )  # fmt: skip
    if tile.blocks > 1:
        torch.sum(of_scale, 0, out=found.scales[-1])
    return found._replace(depthwise=_total(sums))


def _pairs(p: Orepa, second: int) -> list[Tensor]:
    """The fields of ``(O, I)`` as the kernels take them, before and after the product; anything for a missing point."""
    if second:
        return [p.average if p.point is None else p.point.contiguous()]
    return [p.average.contiguous(), p.prior.contiguous()]


# ---------------------------------------------------------------------- layouts


def _laid_out(tensor: Tensor) -> tuple[Tensor, bool]:
    """Taps innermost, else the input channel innermost; copied if it is neither. And which of both."""
    if not tensor.is_contiguous() and tensor.transpose(1, 2).is_contiguous():
        return tensor, True
    return tensor.contiguous(), False


def _as(tensor: Tensor, last: bool) -> Tensor:
    """In this layout, copied if it is not."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if last else tensor.contiguous()


def _empty(like: Tensor, taps: int, last: bool) -> Tensor:
    out, per_group, _ = like.shape
    if last:
        return like.new_empty(out, taps, per_group).transpose(1, 2)
    return like.new_empty(out, per_group, taps)


def _total(sums: Tensor) -> Tensor:
    """The sum over chunks."""
    return sums[0] if len(sums) == 1 else sums.sum(0)


# ---------------------------------------------------------------------- how the work is cut


class _Tile(NamedTuple):
    """What one program does, and how many there are."""

    grid: int
    second: int
    wide: int
    warps: int
    rows: int = 1
    blocks: int = 1
    """Programs beside each other in a row; those of all groups make the grid's first dimension."""

    @property
    def chunks(self) -> int:
        return self.second


def _padded(size: int) -> int:
    """The least power of two that holds it."""
    return 1 << (size - 1).bit_length()


@functools.cache
def _tile_of_rows(groups: int, rows: int, length: int, most: int) -> _Tile:
    """For a kernel of `length` elements per row: as many rows at once, up to `most`, as leave enough programs."""
    wide = min(_THREADS, max(16, _padded(length)))
    blocks, at_once = math.ceil(length / wide), min(most, _padded(rows))
    while at_once > 1 and groups * blocks * math.ceil(rows / at_once) < PROGRAMS:
        at_once //= 2
    return _Tile(groups * blocks, math.ceil(rows / at_once), wide, max(1, wide // 32), at_once, blocks)


@functools.cache
def _tile_of_chunks(groups: int, rows: int, length: int, k: int) -> _Tile:
    """For sums over the rows of a group: first narrower programs, then more chunks, until there are enough."""
    most = max(1, rows // _OUTPUTS_PER_SUM)
    # A thread holds a few numbers for each of 32 taps at most; beyond, threads share them.
    wide = min(_padded(length), max(1, 32 * _THREADS // _padded(k)), _THREADS)
    while wide > 32 and groups * math.ceil(length / wide) * most < PROGRAMS:
        wide //= 2
    blocks = math.ceil(length / wide)
    chunks = min(most, math.ceil(2 * PROGRAMS / (groups * blocks)))
    warps = max(1, min(_THREADS, wide * max(1, _padded(k) // 32)) // 32)
    return _Tile(groups * blocks, chunks, wide, warps, blocks=blocks)


# ---------------------------------------------------------------------- launches


def _kernels() -> Any:
    from . import _triton_kernels

    return _triton_kernels


def _launch(kernel: Any, tile: _Tile, first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the device of its tensors."""
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return _launch(kernel, tile, first, *arguments, **constants)
    # Fusing products with sums is said aloud, since Triton's default changes.
    kernel[tile.grid, tile.second](first, *arguments, **constants, num_warps=tile.warps, enable_fp_fusion=True)
