"""Which layers a user means: glob patterns on their names, with one meaning in every framework."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from ._arguments import expect
from .errors import NoMatchError, UnsupportedError, nearest, shown

Patterns = str | Iterable[str] | None


class Selection:
    """The layers that `include` takes (None: all) and `exclude` leaves.

    >>> chosen = Selection("layer1.*", ["*.conv2"])
    >>> chosen.takes(["layer1.0.conv1"]), chosen.takes(["layer1.0.conv2"]), chosen.takes(["conv1"])
    (True, False, False)
    """

    def __init__(self, include: Patterns, exclude: Patterns):
        self._include = None if include is None else _as_list("include", include)
        self._exclude = [] if exclude is None else _as_list("exclude", exclude)

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


T = TypeVar("T")
UNSELECTED = "it is not selected by include, exclude and where"


def weigh(
    names: Mapping[T, Sequence[str]],
    selection: Selection,
    reason_against: Callable[[T], str | None],
    *,
    model: str,
    where: Callable[[str, T], bool] | None = None,
) -> dict[T, str | None]:
    """For each convolution why it is to be left as it is: `UNSELECTED`, a reason of `reason_against`, or None.

    The arguments are those of `choose`.

    Raises:
        NoMatchError: when a pattern matches no name.

    >>> weigh({3: ["a"], 4: ["b"]}, Selection(None, "b"), lambda layer: None, model="Net")
    {3: None, 4: 'it is not selected by include, exclude and where'}
    """
    if where is not None and not callable(where):
        raise TypeError(f"where: expected a function of name and module, received {shown(where)}")
    selection.check([name for group in names.values() for name in group], model)
    return {
        layer: reason_against(layer)
        if selection.takes(group) and (where is None or where(group[0], layer))
        else UNSELECTED
        for layer, group in names.items()
    }


def choose(
    names: Mapping[T, Sequence[str]],
    selection: Selection,
    reason_against: Callable[[T], str | None],
    *,
    method: str,
    model: str,
    kinds: str,
    foldable: type,
    where: Callable[[str, T], bool] | None = None,
) -> dict[T, str]:
    """The convolutions to replace, each with its first name.

    Args:
        names: every convolution of the model and the names that it has there, foldable ones too.
        selection: the user's patterns.
        reason_against: why a convolution cannot be replaced (a clause for a message), or None.
        method, model: their names, for messages.
        kinds: the classes of convolutions that could be replaced, for messages.
        foldable: what is foldable already; that `include` spells one of these out is no error.
        where: the user's further condition on name and convolution.

    Raises:
        NoMatchError: when nothing is chosen, or a pattern matches no name.
        UnsupportedError: for a convolution that `include` spells out and that cannot be replaced.

    >>> def reason_against(layer):
    ...     return "it has one tap" if layer == 1 else None
    >>> words = {"method": "doconv", "model": "Net", "kinds": "Conv", "foldable": str}
    >>> choose({3: ["a", "again"], 1: ["b"]}, Selection(None, None), reason_against, **words)
    {3: 'a'}
    >>> choose({3: ["a", "again"], 1: ["b"]}, Selection("b", None), reason_against, **words)
    Traceback (most recent call last):
    foldconv.errors.UnsupportedError: b: int cannot become doconv: it has one tap
    """
    reasons = weigh(names, selection, reason_against, model=model, where=where)
    words = {"method": method, "model": model, "kinds": kinds, "foldable": foldable}
    return pick(names, reasons, selection, **words, where=where)


def pick(
    names: Mapping[T, Sequence[str]],
    reasons: Mapping[T, str | None],
    selection: Selection,
    *,
    method: str,
    model: str,
    kinds: str,
    foldable: type,
    where: object = None,
) -> dict[T, str]:
    """What `choose` returns and raises, from the answer of `weigh`."""
    everywhere = [name for group in names.values() for name in group]
    chosen = {layer: names[layer][0] for layer, reason in reasons.items() if reason is None}
    refused = {names[layer][0]: reason for layer, reason in reasons.items() if reason not in (None, UNSELECTED)}
    for layer, reason in reasons.items():
        group = names[layer]
        if reason not in (None, UNSELECTED) and selection.spells_out(group) and not isinstance(layer, foldable):
            raise UnsupportedError(f"{group[0] or 'the root'}: {type(layer).__name__} cannot become {method}: {reason}")
    if chosen:
        return chosen
    what = f"nothing to expand with {method!r} in {model}: "
    if not everywhere:
        raise NoMatchError(f"{what}expected convolutions ({kinds}), found none")
    if not refused:
        conditions = "include and exclude" if where is None else "include, exclude and where"
        raise NoMatchError(f"{what}none of its {len(everywhere)} convolutions is selected by {conditions}")
    name, reason = next(iter(refused.items()))
    raise NoMatchError(
        f"{what}{len(refused)} convolutions selected, none of them replaceable; {name or 'the root'}: {reason}"
    )


def _as_list(name: str, patterns: str | Iterable[str]) -> list[str]:
    expected = "a pattern on names, or several"
    expect(name, patterns, (str, Iterable), expected)
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in found:
        expect(name, pattern, str, expected)
    return found


def _any_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    if not names:
        return "(there are none)"
    shown = ", ".join(repr(name) if name else "'' (the root)" for name in names[:3])
    return shown + (", ..." if len(names) > 3 else "")
