"""What networks return, taken apart and compared: tensors, arrays and numbers in whatever holds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import MemberDescriptorType
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError


def difference(expected: Any, received: Any, what: str) -> tuple[float, float]:
    """Largest absolute difference and largest absolute value over all numbers of two outputs.

    Args:
        expected, received: tensors, NumPy arrays, numbers, or what holds them: sequences, mappings, named tuples,
            dataclasses, any object's attributes.
        what: what is compared, for messages.

    Raises:
        UnsupportedError: when the two are not made alike, or hold no tensor, array or number with a fraction.

    Example:
        >>> difference({"a": [torch.zeros(2), 1.0]}, {"a": [torch.ones(2), 1.5]}, "the output")
        (1.0, 1.0)
    """
    left, right = dict(_parts(expected)), dict(_parts(received))
    for where in [*left, *right]:
        ours, theirs = _structure(left, where), _structure(right, where)
        if ours != theirs:
            raise UnsupportedError(
                f"{what}{where}: expected the structure of the first network, {ours}, received {theirs}; are these one "
                "network?"
            )
    error = scale = 0.0
    compared = False
    for where, value in left.items():
        if isinstance(value, Tensor):
            compared |= value.numel() > 0 and (value.dim() > 0 or value.is_floating_point() or value.is_complex())
            x, y = _numbers(value), _numbers(right[where]).to(value.device)
            if x.shape != y.shape:
                raise UnsupportedError(f"{what}{where}: expected the shape {tuple(x.shape)}, received {tuple(y.shape)}")
            if x.numel():
                gap = (x - y).abs().max().item()
                # max() would hide a NaN behind a number.
                error = gap if gap != gap else max(error, gap)
                scale = max(scale, x.abs().max().item())
    if not compared:
        if any(isinstance(value, Tensor) and not value.numel() for value in left.values()):
            raise UnsupportedError(
                f"{what}: nothing to compare, its tensors are empty, as a detector's are that finds nothing; give "
                "inputs on which it finds something, or lower the score from which on it keeps a box"
            )
        raise UnsupportedError(
            f"{what}: nothing to compare in {_structure(left, '')}, expected tensors, arrays, or what holds them; wrap "
            "the network in one that returns its tensors"
        )
    return error, scale


def apart(expected: Any, received: Any, tolerance: float) -> str | None:
    """The first part in which two outputs differ, in words; None, where none does.

    Of numbers with fractions only: a rank or a choice may turn over where two are as good as equal.

    Args:
        expected, received: as in `difference`.
        tolerance: largest difference, relative to the largest value of the part.

    Example:
        >>> apart({"a": torch.ones(2), "n": 1}, {"a": torch.ones(2) + 1e-9, "n": 2}, 1e-6)
        >>> apart({"a": torch.ones(2)}, {"a": torch.zeros(2)}, 1e-6)
        "['a']: expected a difference of at most 1.0e-06, received 1.0e+00"
    """
    left, right = dict(_parts(expected)), dict(_parts(received))
    for where in [*left, *right]:
        ours, theirs = _structure(left, where), _structure(right, where)
        if ours != theirs:
            return f"{where}: expected {ours}, received {theirs}"
        x, y = left[where], right[where]
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            continue
        x, y = _numbers(x), _numbers(y).to(x.device)
        if x.shape != y.shape:
            return f"{where}: expected the shape {tuple(x.shape)}, received {tuple(y.shape)}"
        same = (x == y) | (x.isnan() & y.isnan())
        if not same.all():
            error = (x - y)[~same].abs().max().item()
            # What is infinite (a mask, say) is no measure of the rest.
            finite = x[x.isfinite()].abs()
            allowed = tolerance * (finite.max().item() if finite.numel() else 0) + _NOTHING
            if not error <= allowed:
                return f"{where}: expected a difference of at most {allowed:.1e}, received {error:.1e}"
    return None


_NOTHING = 1e-9
"""What is left of values that cancel out."""


def _structure(parts: dict[str, Any], where: str) -> str:
    value = parts.get(where, "nothing")
    return "a tensor" if isinstance(value, Tensor) else value


def _parts(value: Any, where: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Each part of a value by its place: tensors for what is numbers, words for everything else."""
    kind = type(value)
    numbers = _as_tensor(value)
    if numbers is not None:
        yield where, numbers
    elif isinstance(value, (str, bytes)) or value is None:
        yield where, repr(value)
    elif id(value) in above or isinstance(value, (torch.nn.Module, type)) or callable(value):
        yield where, kind.__qualname__
    else:
        yield where, kind.__qualname__
        for name, part in _members(value):
            yield from _parts(part, where + name, (*above, id(value)))


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", value[key]) for key in value)
    elif isinstance(value, (list, tuple, deque)):
        names: Iterable[str] = getattr(value, "_fields", ())
        yield from ((f".{n}", item) for n, item in zip(names, value)) if names else _numbered(value)
    elif type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        yield from _numbered(value.ravel().tolist())  # an array of objects
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{item!r}}}", item) for item in value if _as_tensor(item) is None)
        yield from _numbered([item for item in value if _as_tensor(item) is not None])
    slots = (n for cls in type(value).__mro__ for n, m in vars(cls).items() if type(m) is MemberDescriptorType)
    held = {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})
    for name, item in held.items():
        # Counters and caches of an object's own say nothing of what was computed; tensors do.
        if not name.startswith("_") or isinstance(item, (Tensor, list, tuple, dict)):
            yield f".{name}", item


def _numbered(items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"[{i}]", item) for i, item in enumerate(items))


def _as_tensor(value: Any) -> Tensor | None:
    """The numbers of a tensor, an array, or a number; None for anything else."""
    if isinstance(value, Tensor):
        return value
    found: Any = value
    of_numpy = type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype")
    if not of_numpy and not isinstance(value, (bool, int, float, complex)):
        return None
    try:
        return torch.as_tensor(found.copy() if of_numpy else found)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None  # of objects, or of text


def _numbers(tensor: Tensor) -> Tensor:
    """A dense tensor of float64 that shows every difference of the given one."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_nested:
        tensor = torch.cat([part.flatten() for part in tensor.unbind()])
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.double()
