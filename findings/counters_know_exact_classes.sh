#!/usr/bin/env bash
# torchinfo and ptflops find a convolution by its class's own name: a bare subclass of Conv2d counts as (almost) nothing, so published multiply-adds of such networks are wrong.
# Guessed before running: isinstance, or the operations that run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 torchinfo==1.8.0 ptflops==0.7.5 numpy==2.4.6
env/bin/python - <<'PY'
from importlib.metadata import version
import torchinfo
from ptflops import get_model_complexity_info
from torch import nn


class Own(nn.Conv2d):
    pass


seen = {}
for layer in (nn.Conv2d, Own):
    def net():
        return nn.Sequential(layer(3, 8, 3))

    counts = [torchinfo.summary(net(), (1, 3, 17, 17), verbose=0).total_mult_adds]
    for backend in ("pytorch", "aten"):
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
        counts.append(get_model_complexity_info(net(), (3, 17, 17), **options)[0])
    seen[layer.__name__] = counts
    print(f"torchinfo {version('torchinfo')}, ptflops {version('ptflops')} (pytorch, aten): {layer.__name__} {counts}")
assert seen == {"Conv2d": [50400, 50400, 50400], "Own": [224, 0, 50400]}
PY
