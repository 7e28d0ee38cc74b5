"""The registry of checks, and the decorator that runs them under pytest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..methods import Method, as_method, list_methods

Check = Callable[[Method], None]
CHECKS: dict[str, Check] = {}


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def check(function: Check) -> Check:
    """Decorator: add a check to the battery, named after the function."""

    def run(method: Method) -> None:
        with _seeded():
            function(method)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    CHECKS[function.__name__] = run
    return run


def parametrize_with_checks(methods: Sequence[str | Method] | None = None) -> Any:
    """A pytest decorator: every method (by default every registered one) × every check.

    The test takes two arguments, ``method`` and ``check``. Needs pytest.
    """
    import pytest

    configs = [as_method(m) for m in (list_methods() if methods is None else methods)]
    pairs = [(m, c) for m in configs for c in CHECKS.values()]
    return pytest.mark.parametrize(("method", "check"), pairs, ids=[f"{m.name}-{c.__name__}" for m, c in pairs])
