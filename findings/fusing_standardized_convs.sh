#!/usr/bin/env bash
# torch's and ultralytics' conv-norm fusers deep-copy a weight-standardized convolution (timm's StdConv2d) and scale its weight, which it standardizes away again: silently wrong.
# Guessed before running: they build a plain Conv2d, or refuse a subclass with a forward of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 timm==1.0.31 ultralytics==8.4.190
env/bin/python - <<'PY'
import copy
import timm
import torch
import ultralytics
from timm.layers import StdConv2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from ultralytics.utils.torch_utils import fuse_conv_and_bn

torch.manual_seed(0)
conv, norm = StdConv2d(3, 8, 3, bias=False).eval(), nn.BatchNorm2d(8).eval()
norm.running_mean.normal_()
norm.running_var.uniform_(0.5, 2)
x = torch.randn(2, 3, 9, 9)
for name, fuser in (("torch " + torch.__version__, fuse_conv_bn_eval), ("ultralytics " + ultralytics.__version__, fuse_conv_and_bn)):
    with torch.no_grad():
        right = norm(conv(x))
        fused = fuser(copy.deepcopy(conv), copy.deepcopy(norm))
        off = ((right - fused(x)).abs().max() / right.abs().max()).item()
    print(f"{name}, timm {timm.__version__}: a {type(fused).__name__}, off by {off:.2f}")
    assert type(fused) is StdConv2d and off > 0.1
PY
