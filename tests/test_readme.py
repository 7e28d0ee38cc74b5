"""The README tells the truth: what it shows is run as it stands there, and its tables are what was measured."""

import importlib.util
import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from foldconv.lab.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def form(text):
    """A text without its figures, which are another processor's, and without how wide they are.

    Which epoch was best is said where it was not the last.
    """
    lines = (" ".join(line.split()) for line in text.strip().splitlines())
    return [re.sub(r"[-+]?[\d,.]+(e[-+]\d+)?", "#", line) for line in lines if not line.startswith("best.ckpt ")]


def commands(block):
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 120


def test_the_first_command_ends_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = blocks("sh")[0].splitlines()[0]
    install, command = first.partition("#")[0].strip().split(" && ")
    assert install == 'pip install ".[train]"'
    with redirect_stdout(io.StringIO()) as out:
        assert main(command.split()[1:]) == 0
    assert form(out.getvalue()) == form(blocks("text")[0])


def test_the_test_command_is_what_ci_runs():
    command = blocks("sh")[0].splitlines()[1].partition("#")[0].strip()
    assert (ROOT / ".ci" / "run").read_text().strip().endswith(command)


def test_the_example_prints_what_is_shown(capsys):
    pytest.importorskip("timm")
    names = {}
    exec(blocks("python")[0], names)
    assert form(capsys.readouterr().out) == form(blocks("text")[1])
    assert names["foldconv"].verify(names["rich"], names["net"], names["images"]).ok(1e-4)


def test_the_commands_run_on_a_readers_data(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(random.integers(0, 255, (40, 40, 3), np.uint8)).save(f"photos/{name}/{number}.jpg")
    train, *others = commands(blocks("sh")[1])
    assert train[:2] == ["foldconv", "train"]
    for command in ([*train, "--epochs", "1", "--no-baseline"], *others):
        assert main(command[1:]) == 0, capsys.readouterr().err
    assert {"first.safetensors", "first.report.json", "first.pt2"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["write_methods_table", "write_support_table"])
def test_the_tables_are_what_was_measured(name):
    assert script(name).with_table(README) == README


def test_every_named_file_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
