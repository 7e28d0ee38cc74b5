"""`Borrowed`: a module whose ``weight`` and ``bias`` are another's; torch's utilities that take them are told so.

Pruning, weight_norm, spectral_norm and parametrizations put something else in a parameter's place, in the module that
holds it. Reading, writing in place, and initializers need no more than to reach the parameter.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NoReturn

from torch import nn
from torch.nn.utils import parametrize

from ..errors import UnsupportedError

_BORROWED = ("weight", "bias")


class Borrowed(nn.Module):
    """Base of modules that look like a convolution or a norm and hold it elsewhere.

    Raises:
        UnsupportedError: where ``weight`` or ``bias`` is taken out of the module, or something put beside it.
    """

    held_in: ClassVar[tuple[str, str]]
    """What the module has inside it, and the name of the property that gives it."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["_parameters"] = _ELSEWHERE[self.held_in]()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch does; but for what stands beside a weight that is not here."""
        if name.partition("_")[0] in _BORROWED:
            _refuse(self.held_in, name.partition("_")[0])
        super().register_parameter(name, param)

    def __getattr__(self, name: str) -> Any:
        if name == "parametrizations":  # torch asks for those that are there before it adds one
            frame = sys._getframe(1)
            for _ in range(4):
                if frame is not None and frame.f_code is parametrize.register_parametrization.__code__:
                    _refuse(self.held_in, frame.f_locals["tensor_name"])
                frame = frame and frame.f_back
        return super().__getattr__(name)

    def __delattr__(self, name: str) -> None:
        if name in _BORROWED:
            _refuse(self.held_in, name)
        super().__delattr__(name)


class _Elsewhere(dict[str, Any]):
    """The parameters of a module that has none of its own."""

    held_in: ClassVar[tuple[str, str]]

    def __missing__(self, key: str) -> Any:
        return self._absent(key)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            self._absent(key)
        super().__delitem__(key)

    def _absent(self, key: str) -> NoReturn:
        if key in _BORROWED:
            _refuse(self.held_in, key)
        raise KeyError(key)


class _InConvolution(_Elsewhere):
    held_in = ("convolution", "conv")


class _InNorm(_Elsewhere):
    held_in = ("norm", "norm")


_ELSEWHERE = {cls.held_in: cls for cls in (_InConvolution, _InNorm)}


def _refuse(held_in: tuple[str, str], name: str) -> NoReturn:
    what, where = held_in
    raise UnsupportedError(
        f"{name}: expected a parameter of the module itself, this one is that of the {what} inside a branched layer; "
        f"prune or parametrize its .{where} instead, or fold first"
    )
