"""Which path a network's layers take, and why."""

from torch import nn

import foldconv
from foldconv.ops import _cpu


def test_explain_names_every_layer_and_its_reason(monkeypatch):
    monkeypatch.setattr(_cpu, "_has_numba", lambda: True)
    plain = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(16, 1, 5), nn.ConvTranspose2d(1, 8, 3))
    lines = foldconv.explain(foldconv.expand(plain, "doconv")).split("\n")
    assert [line.split(": ")[1] for line in lines] == ["cpu", "torch", "torch"]
    assert "400 weights are too few" in lines[1]
    assert "what torch computes well" in lines[2]
