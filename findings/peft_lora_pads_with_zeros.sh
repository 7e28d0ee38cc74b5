#!/usr/bin/env bash
# PEFT's LoRA on a convolution with circular or reflect padding trains an adapter that pads with zeros; merged, its update is padded as the convolution pads: another function than the one that was trained and validated, silently.
# Guessed before running: the adapter pads as its convolution does, or the layer is refused, as merging is for groups.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6
env/bin/python -W ignore - <<'PY'
import peft
import torch
from torch import nn

print(f"peft {peft.__version__}, torch {torch.__version__}")
off = {}
for mode in ("zeros", "circular", "reflect", "replicate"):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, padding_mode=mode)).double()
    images = torch.randn(16, 3, 8, 8).double()
    teacher = nn.Conv2d(3, 16, 3, padding=1, padding_mode=mode).double()
    target = teacher(images).detach()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"], r=8)).double()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (model(images) - target).square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = model(images)
        merged = model.merge_and_unload(safe_merge=True)(images)
    error = (trained - merged).abs()
    off[mode] = error.max().item() / trained.abs().max().item()
    inside = error[..., 1:-1, 1:-1].max().item() / trained.abs().max().item()
    print(f"{mode:9} merged is {off[mode]:.1e} off; away from the border {inside:.1e}")
    assert inside < 1e-6
assert off["zeros"] < 1e-6 and all(off[mode] > 0.05 for mode in off if mode != "zeros")
PY
