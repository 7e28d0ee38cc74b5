"""The rule that picks the path of a composition: by device, dtype and what is looking on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import UnsupportedError
from . import _blocks, _cpu, _gpu
from ._context import VARIABLE, asked_for, forced_path, is_observed
from ._trial import Trial


class Path(Protocol):
    """One way to compute the compositions and their gradients; a module with these functions is one."""

    name: str
    least: Callable[..., int]
    """From tensors, the number of weights from which on the path gains anything; fewer take it only when forced."""

    reason_against: Callable[..., str | None]
    depthwise: Callable[[Tensor, Tensor, int], Tensor]
    depthwise_gradients: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


_FAST: tuple[Any, ...] = (Trial(_gpu), _cpu, _blocks)

_decisions: dict[tuple[Any, ...], Path | None] = {}
"""What `decide` has found, by what it follows from."""
MOST_DECISIONS = 1 << 12
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_decisions.clear)


def paths() -> tuple[str, ...]:
    """Names of all paths, in the order in which they are tried.

    Example:
        >>> paths()
        ('gpu', 'cpu', 'blocks', 'torch')
    """
    return (*(path.name for path in _FAST), "torch")


if asked_for is not None and asked_for not in paths():
    raise UnsupportedError(f"{VARIABLE}: expected one of {', '.join(paths())}, received {asked_for!r}")


def choose(*tensors: Tensor) -> Path | None:
    """The path for a composition of these tensors; None: torch operations.

    Raises:
        UnsupportedError: when `using` forces a path that cannot take them.
    """
    forced = forced_path.get()
    for path in _FAST:
        if forced in (None, path.name):
            reason = _reason_against(path, tensors)
            if reason is None:
                return path
            if forced is not None and not is_observed():
                raise UnsupportedError(f"path {forced!r} cannot be taken: {reason}")
    return None


def decide(check: Callable[..., None], groups: int, *tensors: Tensor | None) -> Path | None:
    """What `choose` picks, found once for tensors of these shapes, dtypes and devices.

    Args:
        check: raises where the shapes do not fit each other; gets the tensors and `groups`, before anything is chosen.
    """
    if is_observed():
        check(*tensors, groups)
        return None
    key = _key(check, groups, tensors)
    try:
        return _decisions[key]
    except KeyError:
        check(*tensors, groups)
        path = choose(*(t for t in tensors if t is not None))
        if len(_decisions) >= MOST_DECISIONS:
            _decisions.clear()
        _decisions[key] = path
        return path


def decided(check: Callable[..., None], groups: int, *tensors: Tensor | None) -> Path | None:
    """What `decide` found for such tensors before, if it was anything."""
    return _decisions.get(_key(check, groups, tensors))


def _key(check: Callable[..., None], groups: int, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """All that a decision follows from."""
    kinds = [None if t is None else (type(t), t.shape, t.dtype, t.device) for t in tensors]
    return check, groups, forced_path.get(), *kinds


def _reason_against(path: Any, tensors: tuple[Tensor, ...]) -> str | None:
    if is_observed():
        return "a compiler, tracer, function transform or mode looks on"
    first = tensors[0]
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter):
            return f"{type(t).__name__} is a subclass of Tensor"
        if t.device != first.device or t.dtype != first.dtype:
            return "the tensors differ in device or dtype"
        if t.numel() == 0:
            return "a tensor is empty"
    if forced_path.get() is None and first.numel() < path.least(*tensors):
        return f"{first.numel()} weights are too few to gain by it"
    return path.reason_against(*tensors)


@contextlib.contextmanager
def using(path: str) -> Iterator[None]:
    """Take this path inside the block, in this thread, instead of the one that the rule would pick.

    Args:
        path: one of `paths`.

    Raises:
        UnsupportedError: for another name at once; when a composition cannot take the path, there.

    Example:
        >>> import torch
        >>> with using("torch"):
        ...     choose(torch.zeros(8, 4, 9))
    """
    if path not in paths():
        raise UnsupportedError(f"path: expected one of {', '.join(paths())}, received {path!r}")
    token = forced_path.set(path)
    try:
        yield
    finally:
        forced_path.reset(token)


def why(*tensors: Tensor) -> str:
    """The path that a composition of these tensors takes now, and the reason, as ``"cpu: not gpu, …"``.

    Example:
        >>> import torch
        >>> with using("torch"):
        ...     why(torch.zeros(8, 4, 9))
        'torch: asked for by foldconv.ops.using'
    """
    forced = forced_path.get()
    if forced is not None:
        return f"{forced}: asked for by {VARIABLE if forced == asked_for else 'foldconv.ops.using'}"
    reasons = []
    for path in _FAST:
        reason = _reason_against(path, tensors)
        if reason is None:
            return f"{path.name}: " + ("; ".join(reasons) or "fits its device, dtype and shape")
        reasons.append(f"not {path.name}, {reason}")
    return "torch: " + "; ".join(reasons)
