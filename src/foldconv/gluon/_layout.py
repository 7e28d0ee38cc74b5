"""Kernels in Gluon's layout, composed by `foldconv.formulas`: on arrays or symbols (``F``), and in NumPy.

Reshapes count no input channels: they are written in MXNet's codes (0 keeps a dimension, -1 infers one, -3 merges two,
-4 splits one), so that they hold for symbols whose number of input channels is not known yet.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import formulas


class _Gluon:
    """`foldconv.formulas.Primitives` of ``mx.nd`` or ``mx.sym``."""

    def __init__(self, F: Any, groups: int):
        self.F, self.groups = F, groups

    def matmul(self, a: Any, b: Any, /) -> Any:
        """One batched product; ``batch_dot`` knows a single batch dimension."""
        F = self.F
        product = F.batch_dot(F.reshape(a, shape=(-3, 0, 0)), F.reshape(b, shape=(-3, 0, 0)))
        return F.reshape(product, shape=(-4, self.groups, -1, 0, 0))

    def first_taps(self, x: Any, taps: int, /) -> Any:
        """See `foldconv.formulas.Primitives`."""
        return self.F.slice_axis(x, axis=2, begin=0, end=taps)


class _NumPy:
    """`foldconv.formulas.Primitives` of NumPy."""

    matmul = staticmethod(np.matmul)

    @staticmethod
    def first_taps(x: np.ndarray, taps: int, /) -> np.ndarray:
        return x[:, :, :taps]


NUMPY = _NumPy()


def doconv(
    F: Any,
    weight: Any,
    D: Any,
    extra: Any,
    size: tuple[int, int],
    multiplier: int,
    groups: int,
    *,
    channels_last: bool = False,
    half: bool = False,
) -> Any:
    """The kernel of a DO-Conv.

    Where shapes are inferred, the convolution's own kernel is all that is known; ``like`` carries it to the parameters.

    Args:
        F: ``mx.nd`` or ``mx.sym``.
        weight: ``(out, in/g, *size)``, or ``(out, *size, in/g)``.
        D: ``(in, k, S)``, what is added to the identity; k the taps of a kernel of `size`.
        extra: ``(out, in/g, S - k)``, or None where S = k.
        size: height and width of the kernel.
        multiplier: S.
        groups: of the convolution.
        channels_last: whether `weight` is in the second of its forms, that of layout NHWC.
        half: whether the parameters are in float16; composed in float32 then.

    Returns:
        The kernel in the form and dtype of `weight`.

    Example:
        >>> import mxnet as mx
        >>> doconv(mx.nd, mx.nd.ones((8, 2, 3, 3)), mx.nd.zeros((4, 9, 9)), None, (3, 3), 9, 2).shape
        (8, 2, 3, 3)
    """
    like = F._internal._identity_with_attr_like_rhs
    k = size[0] * size[1]
    taps = F.reshape(F.transpose(weight, axes=(0, 3, 1, 2)) if channels_last else weight, shape=(0, 0, -3))
    if extra is not None:
        per_channel = F.slice_axis(taps, axis=2, begin=0, end=1)
        taps = F.concat(taps, like(extra, F.broadcast_axis(per_channel, axis=2, size=multiplier - k)), dim=2)
    W = F.transpose(F.reshape(taps, shape=(-4, groups, -1, 0, 0)), axes=(0, 2, 3, 1))
    per_input = F.slice_axis(F.reshape(W, shape=(-3, 0, 0)), axis=2, begin=0, end=1)
    D = like(D, F.broadcast_axis(F.transpose(per_input, axes=(0, 2, 1)), axis=1, size=k))
    D = F.reshape(D, shape=(-4, groups, -1, 0, 0))
    if half:
        W, D = F.cast(W, dtype="float32"), F.cast(D, dtype="float32")
    kernel = formulas.doconv(W, D, k, _Gluon(F, groups))
    if half:
        kernel = F.cast(kernel, dtype="float16")
    kernel = F.reshape(F.transpose(kernel, axes=(0, 3, 1, 2)), shape=(-3, 0, -4, *size))
    return like(F.transpose(kernel, axes=(0, 2, 3, 1)) if channels_last else kernel, weight)


def doconv_in_float64(weight: np.ndarray, D: np.ndarray, extra: np.ndarray | None, groups: int) -> np.ndarray:
    """The same in NumPy and float64; shapes as in `doconv`, `weight` in its first form.

    Example:
        >>> doconv_in_float64(np.ones((8, 2, 3, 3)), np.zeros((4, 9, 9)), None, 2).shape
        (8, 2, 3, 3)
    """
    taps = weight.astype(np.float64).reshape(*weight.shape[:2], -1)
    k = taps.shape[2]
    if extra is not None:
        taps = np.concatenate([taps, extra.astype(np.float64)], axis=2)
    W = taps.reshape(groups, -1, *taps.shape[1:]).transpose(0, 2, 3, 1)
    kernel = formulas.doconv(W, D.astype(np.float64).reshape(groups, -1, *D.shape[1:]), k, NUMPY)
    return kernel.transpose(0, 3, 1, 2).reshape(weight.shape)
