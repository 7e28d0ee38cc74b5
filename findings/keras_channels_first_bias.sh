#!/usr/bin/env bash
# On TensorFlow, Keras adds a channels_first layer's bias along the wrong axis where the output is as wide as it has filters: models for GPUs are silently wrong at one image size.
# Guessed before running: a bias of shape (1, C, 1, 1) is broadcast over the spatial axes at every size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python keras==3.15.1 tensorflow-cpu==2.21.0
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 env/bin/python - <<'PY'
import keras
import numpy as np

channels = 8
bias = np.arange(channels, dtype="float32").reshape(1, channels, 1, 1)
for width in (channels, channels + 1):
    x = np.random.default_rng(0).normal(size=(2, channels, width + 2, width + 2)).astype("float32")
    options = {"kernel_size": 3, "data_format": "channels_first"}
    without, added = (keras.layers.DepthwiseConv2D(use_bias=use, **options) for use in (False, True))
    models = [keras.Sequential([keras.Input(x.shape[1:]), layer]) for layer in (without, added)]
    added.set_weights([*without.get_weights(), bias.ravel()])
    right, seen = models[0].predict(x, verbose=0) + bias, models[1].predict(x, verbose=0)
    off = float(abs(right - seen).max())
    print(f"keras {keras.__version__}: {channels} filters, output {width} wide: off by {off:.1e}")
    assert (off > 1) == (width == channels)
PY
