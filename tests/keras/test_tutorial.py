"""The site's tutorial on Keras runs as written."""

import importlib.util
from pathlib import Path

import numpy as np


def test_keras(tmp_path, monkeypatch):
    path = Path(__file__).parent.parent / "test_tutorials.py"
    spec = importlib.util.spec_from_file_location("tutorials", path)
    tutorials = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tutorials)
    monkeypatch.chdir(tmp_path)
    names = tutorials.run("keras.md")
    assert "DOConv2D" in [type(layer).__name__ for layer in names["rich"].layers]
    assert np.isfinite(names["model"].predict(names["images"], verbose=0)).all()
