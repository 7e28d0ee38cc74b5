#!/usr/bin/env bash
# mmcv's fuse_conv_bn takes timm's BatchNormAct2d for a bare norm and drops its activation, and pairs by order of registration: timm networks come out wrong without a word.
# Guessed before running: norms with an activation are left alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 timm==1.0.31 mmcv-lite==2.2.0
env/bin/python - <<'PY'
import copy
import mmcv
import timm
import torch
from mmcv.cnn import fuse_conv_bn

torch.manual_seed(0)
seen = {}
for name in ("resnet18", "regnetx_002", "densenet121"):
    net = timm.create_model(name).eval()
    fused = fuse_conv_bn(copy.deepcopy(net))
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        right = net(x)
        seen[name] = ((right - fused(x)).abs().max() / right.abs().max()).item()
    print(f"mmcv {mmcv.__version__}, timm {timm.__version__}: {name} fused is off by {seen[name]:.1e}")
assert seen["resnet18"] < 1e-4 and seen["regnetx_002"] > 0.01 and seen["densenet121"] > 0.01
PY
