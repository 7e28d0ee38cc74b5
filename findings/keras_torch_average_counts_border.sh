#!/usr/bin/env bash
# Keras' AveragePooling with padding="same" leaves the border out of its averages, but on torch it pads an odd border with copies of the edge and counts them, as for 3x3 with stride 2 on even images, silently. Who trains on JAX or TensorFlow and serves on torch has another network there.
# Guessed before running: every backend gives what the others give.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python keras==3.15.1 torch==2.15.0 jax==0.10.2 numpy==2.4.6
cat > show.py <<'PY'
import keras
import numpy as np

print(f"Keras {keras.__version__} on {keras.config.backend()}")
random = np.random.default_rng(0)


def averages(x, window, stride):
    """Of the pixels that lie in the image, along both axes, in float64."""
    size = x.shape[1]
    out = -(-size // stride)
    total = max((out - 1) * stride + window - size, 0)
    rows = np.zeros((out, size))
    for i in range(out):
        start = i * stride - total // 2
        rows[i, max(start, 0) : start + window] = 1
    rows /= rows.sum(1, keepdims=True)
    return np.einsum("oh,nhwc,pw->nopc", rows, x, rows)


for size, window, stride in ((15, 3, 2), (16, 3, 1), (16, 3, 2), (15, 4, 1), (15, 4, 2)):
    x = random.standard_normal((2, size, size, 3))
    layer = keras.layers.AveragePooling2D(window, stride, padding="same")
    seen = keras.ops.convert_to_numpy(layer(x.astype("f")))
    right = averages(x, window, stride)
    assert seen.shape == right.shape
    off = np.abs(seen - right).max() / np.abs(right).max()
    border = max((right.shape[1] - 1) * stride + window - size, 0)
    print(f"average of {window}x{window}, stride {stride}, {size} pixels, border of {border}: {off:.1e} off")
    assert off > 0.1 if border % 2 and keras.config.backend() == "torch" else off < 1e-5
PY
for backend in jax torch; do
    KERAS_HOME=. KERAS_BACKEND=$backend env/bin/python show.py 2> errors || { tail -5 errors; exit 1; }
done
