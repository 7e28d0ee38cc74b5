#!/usr/bin/env bash
# brevitas' EqualizeGraph equalizes nothing across torch.relu or Tensor.relu, and TorchFunctionalToModule leaves both as they are, without a word: who calls it on such a network quantizes unequalized weights.
# Guessed before running: torch.relu counts as F.relu does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python torch==2.15.0 brevitas==0.13.4 numpy==2.4.6
env/bin/python -W ignore - <<'PY'
import warnings

warnings.simplefilter("ignore")
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn

from brevitas.fx import symbolic_trace
from brevitas.graph.equalize import EqualizeGraph
from brevitas.graph.standardize import TorchFunctionalToModule


class Net(nn.Module):
    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.first.weight.data[0] *= 100
        self.activation = activation

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


spreads = {}
for name, activation in {"F.relu": F.relu, "torch.relu": torch.relu, "Tensor.relu": lambda x: x.relu()}.items():
    graph = TorchFunctionalToModule().apply(symbolic_trace(Net(activation).eval()))
    graph, regions = EqualizeGraph(return_regions=True).apply(graph)
    ranges = graph.first.weight.detach().abs().amax((1, 2, 3))
    spreads[name] = len(regions), round(float(ranges.max() / ranges.min()))
    print(f"brevitas {version('brevitas')}, {name}: {len(regions)} regions, largest range / smallest {spreads[name][1]}")
assert spreads["F.relu"][0] == 1 and spreads["F.relu"][1] < 20
assert spreads["torch.relu"] == spreads["Tensor.relu"] and spreads["torch.relu"][0] == 0 and spreads["torch.relu"][1] > 80
PY
