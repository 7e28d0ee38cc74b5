"""Each block of code on the site's tutorials runs as written, in one namespace, and prints what stands below it."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import foldconv

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECIPE = re.compile(r"foldconv (?:train|compare)[^`\n]*--config (?!list)([\w/-]+)(?![\w/.-])")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def outline(printed):
    """Printed text without its figures, which other hardware changes."""
    return [re.sub(r"[\d.,]+(e-\d+)?", "#", line).strip() for line in printed.splitlines() if line.strip()]


def run(page):
    """Run a page's blocks in turn; a block of text is what the one before it printed."""
    names, printed, ran = {"__name__": "tutorial"}, "", 0
    for language, code in BLOCK.findall((DOCS / "tutorials" / page).read_text(encoding="utf-8")):
        if language == "text":
            assert outline(printed) == outline(code)
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, page, "exec"), names)
            printed, ran = out.getvalue(), ran + 1
        elif language == "sh" and code.startswith("foldconv "):
            from foldconv.lab.cli import main

            with contextlib.redirect_stdout(io.StringIO()) as out:
                for line in code.replace("\\\n", "").splitlines():
                    assert main(shlex.split(line, comments=True)[1:]) == 0, line
            printed, ran = out.getvalue(), ran + 1
        elif language == "sh" and code.startswith("python examples/"):
            for line in code.splitlines():
                _, script, *arguments = shlex.split(line)
                subprocess.run([sys.executable, ROOT / script, *arguments], check=True)
            ran += 1
    assert ran > 2
    return names


@pytest.fixture
def as_installed(monkeypatch):
    """Of the packages of the extras for users, those that a page says to install are there, and no others."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    modules = {
        extra: {re.match(r"[\w-]+", package)[0].replace("-", "_") for package in packages}
        for extra, packages in extras.items()
        if extra not in ("docs", "test", "lint", "package", "dev")
    }

    def install(page):
        named = re.search(r'pip install "\.\[(.+)\]"', (DOCS / "tutorials" / page).read_text(encoding="utf-8"))[1]
        there = set().union(*(modules[extra] for extra in named.split(",")))
        for module in set().union(*modules.values()) - there:
            monkeypatch.setitem(sys.modules, module, None)

    return install


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_own_checkpoint():
    names = run("own-checkpoint.md")
    assert names["plain"].state_dict().keys() == names["Net"]().state_dict().keys()


def test_pretrained_to_phone(as_installed):
    for package in ("timm", "sklearn", "onnx", "onnxscript", "onnxruntime", "executorch", "brevitas"):
        pytest.importorskip(package)
    as_installed("pretrained-to-phone.md")
    run("pretrained-to-phone.md")
    assert Path("digits-int8.onnx").is_file()
    assert Path("digits.pte").is_file()


def test_a_detector(as_installed):
    for package in ("timm", "torchvision", "torchmetrics", "faster_coco_eval", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    as_installed("detector.md")
    names = run("detector.md")
    assert names["measure"].compute()["map"] > 0.3
    for ours, theirs in zip(names["boxes"], names["found"]):
        assert (ours["boxes"] - theirs["boxes"]).abs().max() < 1e-2


def test_a_comparison_that_decides(monkeypatch):
    """Its commands are taken and their report is written; training is stood in for."""
    pytest.importorskip("rich")
    from foldconv.lab.compare import processes

    fake = Path(__file__).parent / "lab" / "compare" / "fake_train.py"

    def command(job, file, continued):
        return [sys.executable, str(fake), "good", str(job.folder), "resume" if continued else str(file)]

    monkeypatch.setattr(processes, "_command", command)
    run("does-it-help.md")
    assert "seeds to resolve" in Path("comparison/report.md").read_text(encoding="utf-8")
    assert len(Path("comparison/results.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * 10


COMING = (DOCS / "coming-from.md").read_text(encoding="utf-8")
SECTIONS = {part.splitlines()[0]: part for part in COMING.split("\n## ")[1:]}


@pytest.mark.parametrize("section", SECTIONS)
def test_coming_from(section):
    """What is left when lines with a minus go and those with a plus come, runs."""
    blocks = re.findall(r"^```diff\n(.*?)^```$", SECTIONS[section], re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        code = "\n".join(line[2:] for line in block.splitlines() if not line.startswith("-"))
        if code.startswith("foldconv "):
            continue  # its recipes: below
        for package in re.findall(r"\b(peft|timm|torchvision|ultralytics)\b", code):
            pytest.importorskip(package)
        exec(compile(code, section, "exec"), {"foldconv": foldconv})


def test_recipes_that_pages_name_are_there():
    named = {name for page in DOCS.rglob("*.md") for name in RECIPE.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 2
    recipes = Path(foldconv.__file__).parent / "lab" / "recipes"
    assert [name for name in named if not (recipes / f"{name}.yaml").is_file()] == []
