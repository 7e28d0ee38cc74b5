"""What a file says of itself is checked before anything is built by it."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import CheckpointError, UnsupportedError, shown

FORMAT = 1
_DEEPEST = 100
_WIDEST = 1000  # bits; Python writes no more than 4,300 digits


def header_of(text: str, path: Any) -> dict[str, Any]:
    """The JSON of `foldconv.save`, each part of the type that it has to have.

    Raises:
        CheckpointError: for one that is damaged, or of a newer format.
    """
    try:
        header = json.loads(text)
        known = header["format"] == FORMAT and isinstance(header["layers"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        known, header = False, {}
    if not known:
        raise CheckpointError(
            f"{path}: its foldconv header is damaged or of a newer format than {FORMAT}; update foldconv"
        )
    check_layers(header["layers"], path)
    for part, (kind, inside) in {
        "shared": (dict, str),
        "groups": (dict, int),
        "order": (list, str),
        "extra": (dict, object),
    }.items():
        value = header.setdefault(part, kind())
        wrong = [value] if type(value) is not kind else []
        if inside is not object and not wrong:
            wrong = [each for each in (value.values() if kind is dict else value) if type(each) is not inside]
        if wrong:
            expected = f"{kind.__name__} of {inside.__name__}"
            raise CheckpointError(
                f"{path}: its foldconv header: {part}: expected {expected}, received {shown(wrong[0])}"
            )
    return header


def check_layers(layers: Any, path: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Names of layers with options that are plain values, and no numbers beyond what the file's values could fill.

    Raises:
        CheckpointError: naming the layer and the option.
    """
    most = math.inf if tensors is None else max(1024, _numbers(tensors))
    if not isinstance(layers, dict):
        raise CheckpointError(f"{path}: layers: expected names with options, received {shown(layers)}")
    for name, options in layers.items():
        where = f"{path}: layers: {shown(name)}"
        if not isinstance(name, str) or not isinstance(options, dict) or not all(isinstance(o, str) for o in options):
            raise CheckpointError(f"{where}: expected a name with options, received {shown(options)}")
        for option, value in options.items():
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if each is not None and not isinstance(each, (bool, int, float, str)):
                    raise CheckpointError(f"{where}: {shown(option)}: expected a plain value, received {shown(value)}")
                if isinstance(each, (int, float)) and not abs(each) <= most:
                    raise CheckpointError(
                        f"{where}: {shown(option)}: {shown(each)} is beyond the {most:,} values that the file holds"
                    )


@contextlib.contextmanager
def no_larger_than(tensors: Mapping[str, Tensor], path: Any) -> Iterator[None]:
    """Where a network is built by what a file says: one far larger than the file is given up while it grows.

    Raises:
        CheckpointError: more parameters were made than the file could fill, or making them failed.
    """
    numbers, count = 4 * _numbers(tensors) + (1 << 20), 4 * len(tensors) + 1000
    made, parameters, thread = 0, 0, threading.get_ident()

    def weigh(module: Any, name: str, parameter: Any) -> None:
        nonlocal made, parameters
        if parameter is None or threading.get_ident() != thread:
            return
        made, parameters = made + parameter.numel(), parameters + 1
        if made > numbers or parameters > count:
            raise CheckpointError(
                f"{path}: describes a network far larger than the {_numbers(tensors):,} values that it holds"
            )

    handle = register_module_parameter_registration_hook(weigh)
    try:
        yield
    except (RuntimeError, MemoryError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        reason = shown(str(error) or type(error).__name__)[1:-1]
        raise CheckpointError(f"{path}: describes a network that cannot be built ({reason})") from error
    finally:
        handle.remove()


def _numbers(tensors: Mapping[str, Any]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, Tensor))


def check_extra(extra: Any, where: str = "extra", levels: int = _DEEPEST) -> None:
    """Is that what JSON holds and gives back? Tuples come back as lists.

    Raises:
        UnsupportedError: naming the value, by its way from ``extra``.

    >>> check_extra({"epoch": 3, "history": [{"loss": 0.5}]})
    >>> try:
    ...     check_extra({"epoch": 3, "history": [{"loss": {1, 2}}]})
    ... except UnsupportedError as error:
    ...     print(error)
    extra['history'][0]['loss']: expected what JSON can hold, received set: {1, 2}; convert it first
    """
    if not levels:
        raise UnsupportedError(
            f"{where}: expected what JSON can hold, received over {_DEEPEST} levels; convert it first"
        )
    if isinstance(extra, dict):
        for key, value in extra.items():
            if not isinstance(key, str):
                raise UnsupportedError(f"{where}: expected names that are text, as JSON has, received {shown(key)}")
            _check_text(key, where)
            check_extra(value, f"{where}[{shown(key)}]", levels - 1)
    elif isinstance(extra, (list, tuple)):
        for number, value in enumerate(extra):
            check_extra(value, f"{where}[{number}]", levels - 1)
    elif isinstance(extra, str):
        _check_text(extra, where)
    elif isinstance(extra, float) and not math.isfinite(extra):
        raise UnsupportedError(f"{where}: expected what JSON can hold, received {extra}; give None or text")
    elif isinstance(extra, int) and extra.bit_length() > _WIDEST:
        raise UnsupportedError(f"{where}: expected a number that JSON readers take, received over {_WIDEST} bits")
    elif extra is not None and not isinstance(extra, (bool, int, float)):
        raise UnsupportedError(
            f"{where}: expected what JSON can hold, received {type(extra).__name__}: {shown(extra)}; convert it first"
        )


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnsupportedError(f"{where}: expected text, received {shown(text)}, which no file can hold") from None
