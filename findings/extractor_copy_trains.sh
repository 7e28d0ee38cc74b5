#!/usr/bin/env bash
# torchvision's feature extractor made in evaluation mode is in training mode once deep-copied (EMA, AveragedModel, exporters): outputs differ by their own size.
# Guessed before running: a deep copy has the flags of the original.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2
env/bin/python - <<'PY'
import copy
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

torch.manual_seed(0)
extractor = create_feature_extractor(torchvision.models.resnet18().eval(), ["layer1"])
copied = copy.deepcopy(extractor)
with torch.no_grad():
    x = torch.randn(2, 3, 64, 64)
    right, seen = (m(x)["layer1"] for m in (extractor, copied))
off = ((right - seen).abs().max() / right.abs().max()).item()
print(f"torchvision {torchvision.__version__}: training {extractor.training}, of its copy {copied.training}; copy off by {off:.2f}")
assert not extractor.training and copied.training and off > 0.1
PY
