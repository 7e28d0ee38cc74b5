"""Rows as text."""


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
