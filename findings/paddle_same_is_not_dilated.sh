#!/usr/bin/env bash
# Paddle's convolutions with padding="SAME" ignore their dilation: the kernel is applied undilated, and nothing is said. Atrous networks ported from TensorFlow or torch see less than they are told to, and ported weights give other outputs.
# Guessed before running: the dilation counts, as in the documented formula, and the padding is what keeps the size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python paddlepaddle==3.3.1 numpy==2.4.6 setuptools==84.2.1
env/bin/python -W ignore - 2> errors <<'PY' || { tail -5 errors; exit 1; }
import numpy as np
import paddle

print(f"paddlepaddle {paddle.__version__}")
paddle.seed(0)
convolutions = {1: paddle.nn.Conv1D, 2: paddle.nn.Conv2D, 3: paddle.nn.Conv3D}
for dimensions, kind in convolutions.items():
    for groups in (1, 4):
        x = paddle.randn([2, 4, *[11] * dimensions])
        same = kind(4, 8, 3, padding="SAME", dilation=2, groups=groups)
        explicit = kind(4, 8, 3, padding=2, dilation=2, groups=groups)
        undilated = kind(4, 8, 3, padding=1, groups=groups)
        for layer in (explicit, undilated):
            layer.set_state_dict(same.state_dict())
        seen, right, other = (layer(x).numpy() for layer in (same, explicit, undilated))
        assert seen.shape == right.shape == other.shape
        off = [np.abs(seen - each).max() / np.abs(right).max() for each in (right, other)]
        print(f'{kind.__name__}, {groups} groups, "SAME", dilation 2: {off[0]:.1e} from dilated, {off[1]:.1e} from undilated')
        assert off[0] > 0.1 and off[1] < 1e-5
PY
