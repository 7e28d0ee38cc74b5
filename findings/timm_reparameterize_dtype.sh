#!/usr/bin/env bash
# timm's reparameterize_model leaves float32 biases in RepViT, LeViT, TinyViT and EfficientViT-MSRA of another type, so folding before bfloat16 or float64 work ends in a RuntimeError at the first forward.
# Guessed before running: fused weights have the network's type, as they have for MobileOne.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 torchvision==0.29.2 timm==1.0.31
env/bin/python - <<'PY'
import timm
import torch
from timm.utils.model import reparameterize_model

for name in ("repvit_m0_9", "levit_128s", "tiny_vit_5m_224", "efficientvit_m0", "mobileone_s0"):
    fused = reparameterize_model(timm.create_model(name).eval().to(torch.bfloat16))
    types = {str(p.dtype) for p in fused.parameters()}
    try:
        with torch.no_grad():
            fused(torch.randn(1, 3, 224, 224, dtype=torch.bfloat16))
        result = "runs"
    except RuntimeError as error:
        result = str(error)
    print(f"timm {timm.__version__}: {name} in bfloat16, fused: {sorted(types)}, {result}")
    assert (result == "runs") == (name == "mobileone_s0")
PY
