"""The README tells the truth: its example runs, its table is the registry's."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys, readme_example):
    pytest.importorskip("timm")
    names = {}
    exec(readme_example("import foldconv, timm"), names)
    assert names["foldconv"].verify(names["rich"], names["net"], names["torch"].randn(1, 3, 64, 64)).ok(1e-4)
    assert "whole network" in capsys.readouterr().out


def test_the_table_of_methods_is_the_registrys():
    spec = importlib.util.spec_from_file_location("write_methods_table", ROOT / "docs" / "write_methods_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_table(README) == README
    assert "| `doconv` | DO-Conv |" in README


def test_the_test_command_is_what_ci_runs():
    first = README.split("```sh\n")[1].split("```")[0].splitlines()
    assert first[0].startswith('pip install ".[train]" && foldconv train')
    command = first[1].split("#")[0].strip()
    assert (ROOT / ".ci" / "run").read_text().strip().endswith(command)


def test_every_named_file_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_speeds_are_the_measurements():
    spec = importlib.util.spec_from_file_location("write_speed_table", ROOT / "docs" / "write_speed_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_table(README) == README
    assert "| training step, resnet18 8×224² | 1." in README
