"""Sizes that tell when a forward asks how large they are: another size might have another answer.

In a run, what ``x.shape`` and ``x.size()`` give are integers of these kinds. Arithmetic keeps them; a comparison, their
truth, or making them a common integer is a question, unless all that it decides is to raise.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
import types
from typing import Any

import torch
from torch import Tensor, nn

OF_SHAPE = {Tensor.size, Tensor.numel, Tensor.shape.__get__}  # pyright: ignore[reportAttributeAccessIssue]
_QUESTIONS = ("eq", "ne", "lt", "le", "gt", "ge", "bool", "int")
_KEPT = ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow")
_KEPT += (*(f"r{name}" for name in _KEPT), "neg", "pos", "abs", "round", "floor", "ceil", "trunc")


class Asked:
    """Who asked: the modules, of those that run."""

    def __init__(self, running: list[nn.Module]):
        self.running = running
        self.by: set[nn.Module] = set()

    def note(self, frame: types.FrameType) -> None:
        """Python code asks."""
        if _is_torchs(frame) or not self.running:
            return
        code = frame.f_code
        own = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if _decides(code, frame.f_lineno, any(own is module for module in self.running)):
            self.by.add(self.running[-1])

    def note_length(self) -> None:
        """Python code asks for the length of a tensor, which must be a common integer."""
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_torchs(frame):
            frame = frame.f_back
        self.note(frame)

    def of(self, sizes: Any) -> Any:
        """The sizes of a tensor, or one of them, with those that differ from call to call watched: not the channels."""
        if not isinstance(sizes, torch.Size):
            return sizes if isinstance(sizes, bool) or not isinstance(sizes, int) else _size(sizes, self)
        return torch.Size([n if i == 1 and len(sizes) > 2 else _size(n, self) for i, n in enumerate(sizes)])


class _Integer(int):
    asked: Asked


class _Number(float):
    asked: Asked


def _size(value: Any, asked: Asked) -> Any:
    kind = {int: _Integer, float: _Number}.get(type(value))
    if kind is None:
        return value
    watched = kind(value)
    watched.asked = asked
    return watched


def _give(base: type, name: str) -> Any:
    plain = getattr(base, name, None)

    def kept(self: Any, *others: Any) -> Any:
        return _size(plain(self, *others), self.asked)  # pyright: ignore[reportOptionalCall]

    def question(self: Any, *others: Any) -> Any:
        self.asked.note(sys._getframe(1))
        return plain(self, *others)  # pyright: ignore[reportOptionalCall]

    return None if plain is None else question if name[2:-2] in _QUESTIONS else kept


for _kind, _base in ((_Integer, int), (_Number, float)):
    for _name in (f"__{name}__" for name in _QUESTIONS + _KEPT):
        if (_method := _give(_base, _name)) is not None:
            setattr(_kind, _name, _method)
    _kind.__hash__ = _base.__hash__  # pyright: ignore[reportAttributeAccessIssue]
    _kind.__reduce_ex__ = lambda self, protocol, base=_base: (base, (base.__repr__(self),))  # pyright: ignore


def _is_torchs(frame: types.FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == "torch" or name.startswith(__package__ or "foldconv")


@functools.lru_cache(maxsize=1024)
def _decides(code: types.CodeType, line: int, method: bool) -> bool:
    """May a question on this line decide what a module calls?

    Not if all it decides is to raise, nor in a function that is no method unless its answer is what that returns: what
    decides how much to pad sees no layer.
    """
    with contextlib.suppress(OSError, TypeError, SyntaxError, ValueError):
        lines, first = inspect.getsourcelines(code)
        for node in ast.walk(ast.parse(textwrap.dedent("".join(lines)))):
            raises = isinstance(node, ast.Assert) or (
                isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise)
            )
            if raises and node.lineno <= line - first + 1 <= (node.test.end_lineno or 0):  # pyright: ignore
                return False
            if isinstance(node, ast.Return) and node.lineno <= line - first + 1 <= (node.end_lineno or 0):
                return True
        return method
    return True
