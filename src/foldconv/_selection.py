"""Which layers a user means: glob patterns on their names, with one meaning in every framework."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from .errors import NoMatchError, nearest

Patterns = str | Iterable[str] | None


class Selection:
    """The layers that `include` takes (None: all) and `exclude` leaves.

    >>> chosen = Selection("layer1.*", ["*.conv2"])
    >>> chosen.takes(["layer1.0.conv1"]), chosen.takes(["layer1.0.conv2"]), chosen.takes(["conv1"])
    (True, False, False)
    """

    def __init__(self, include: Patterns, exclude: Patterns):
        self._include = None if include is None else _as_list(include)
        self._exclude = [] if exclude is None else _as_list(exclude)

    def check(self, names: Sequence[str], model: str) -> None:
        """Refuse a pattern that matches none of the convolutions' names: it is most likely misspelt.

        Raises:
            NoMatchError: with the nearest name.

        >>> Selection("layer1", None).check(["conv1", "layer1.0"], "Net")
        Traceback (most recent call last):
        foldconv.errors.NoMatchError: the pattern 'layer1' matches no convolution of Net; did you mean 'layer1.*'?; ...
        """
        for pattern in [*(self._include or []), *self._exclude]:
            if not _any_match(names, [pattern]):
                container = _any_match(names, [f"{pattern}.*"])
                hint = f"; did you mean {f'{pattern}.*'!r}?" if container else nearest(pattern, names)
                raise NoMatchError(
                    f"the pattern {pattern!r} matches no convolution of {model}{hint}; "
                    f"expected a glob on names such as {_some(names)}"
                )

    def takes(self, names: Sequence[str]) -> bool:
        """Whether a layer with these names (a shared one has several) is selected."""
        return (self._include is None or _any_match(names, self._include)) and not _any_match(names, self._exclude)

    def spells_out(self, names: Sequence[str]) -> bool:
        """Whether `include` holds one of the names literally, so that leaving the layer out would surprise."""
        return self._include is not None and not set(self._include).isdisjoint(names)


def _as_list(patterns: str | Iterable[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _any_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    if not names:
        return "(there are none)"
    shown = ", ".join(repr(name) if name else "'' (the root)" for name in names[:3])
    return shown + (", ..." if len(names) > 3 else "")
