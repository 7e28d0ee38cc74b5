"""Rows and lists as text."""

from __future__ import annotations


def align(rows: list[tuple[str, ...]]) -> str:
    """Rows as text columns, first two flushed left, a rule under the head.

    >>> print(align([("a", "b", "c"), ("x", "yy", "10")]))
    a  b    c
    ─  ──  ──
    x  yy  10
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], tuple("─" * w for w in widths), *rows[1:]]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def some(names: list[str], between: str = ", ", most: int = 5) -> str:
    """The first few names, and how many more there are.

    >>> some(["a", "b", "c"], most=2), some(["a"])
    ('a, b and 1 more', 'a')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more
