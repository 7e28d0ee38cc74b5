#!/usr/bin/env bash
# torch.fx's fuse absorbs a norm into a convolution that is called twice, so the other call is scaled, too: silently wrong for shared stems and recurrent blocks.
# Guessed before running: it counts the users of the module, or refuses.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 numpy==2.4.6
env/bin/python - <<'PY'
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


torch.manual_seed(0)
net = Twice().eval()
net.norm.running_var.fill_(4.0)
with torch.no_grad():
    x = torch.randn(1, 3, 8, 8)
    right, seen = net(x), fuse(net)(x)
off = ((right - seen).abs().max() / right.abs().max()).item()
print(f"torch {torch.__version__}: fused network off by {off:.2f} of the largest output")
assert off > 0.1
PY
