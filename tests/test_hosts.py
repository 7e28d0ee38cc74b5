"""The page on other people's trainers names tests that exist, and explains each of its numbers."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")


def test_each_cell_names_a_test_or_says_why_not():
    tests = dict(re.findall(r"^(\d+)\. `(tests/\S+?)`", PAGE, re.MULTILINE))
    for named in tests.values():
        path, _, name = named.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), named
    rows = [line.strip("|").split("|")[1:] for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 8
    for cell in (cell.strip() for row in rows for cell in row):
        numbers = re.findall(r"\[(\d+)\]", cell)
        assert numbers or cell.startswith(("no: ", "not tried", "hub: ")), cell
        assert set(numbers) <= tests.keys(), cell
