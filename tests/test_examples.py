"""The examples run, and end in what they promise."""

import importlib.util
from pathlib import Path

import pytest

import foldconv

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


def test_own_block(capsys):
    report = load(next(path for path in EXAMPLES if path.stem == "own_block")).main()
    assert report.ok(1e-5)
    assert [layer.layer for layer in report.layers] == ["FoldableBlock", "FoldableBlock"]
    assert "Conv2d(8, 8, kernel_size=(5, 5)" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of Lightning and of torch's data loaders
def test_lightning_module(tmp_path, capsys):
    example = load(next(path for path in EXAMPLES if path.stem == "lightning_module"))
    accuracy, difference = example.main(["--epochs", "2", "--out", str(tmp_path)])
    assert accuracy > 0.5
    assert difference < 1e-6
    assert "folded: ['Conv2d']" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # of timm
def test_timm_training(tmp_path, capsys):
    example = load(next(path for path in EXAMPLES if path.stem == "timm_training"))
    best, folded, difference = example.main(["--epochs", "1", "--out", str(tmp_path)])
    assert folded == pytest.approx(best, abs=0.5)
    assert difference < 1e-6
    assert "largest difference" in capsys.readouterr().out
    names = foldconv.read_weights(tmp_path / "folded.pth").keys()
    assert not any(name.endswith(".D") for name in names)
