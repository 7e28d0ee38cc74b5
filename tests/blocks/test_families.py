"""Every kind of block says what it is for, and the page of them is the registry's."""

import importlib.util
from pathlib import Path

from foldconv.blocks import families

ROOT = Path(__file__).parents[2]


def test_every_recipe_says_what_it_is_for():
    rows = families()
    assert {source for source, _, _ in rows} == {"timm", "ultralytics", "copied"}
    assert all(names and text.endswith(".") for _, names, text in rows)


def test_the_page_is_the_registry():
    spec = importlib.util.spec_from_file_location("write_blocks_table", ROOT / "docs" / "write_blocks_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert module.with_table(page) == page, "run python docs/write_blocks_table.py"
