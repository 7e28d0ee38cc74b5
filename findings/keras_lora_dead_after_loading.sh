#!/usr/bin/env bash
# In Keras, weights that are loaded after enable_lora set both of LoRA's factors to zero: neither has a gradient, and fine-tuning never moves.
# Guessed before running: loading the base weights leaves the factors as enable_lora made them, one random and one zero.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python keras==3.15.1 tensorflow-cpu==2.21.0
KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 env/bin/python - <<'PY'
import keras
import numpy as np

random = np.random.default_rng(0)
x, y = random.normal(size=(64, 8)).astype("float32"), random.normal(size=(64, 3)).astype("float32")


def network():
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])


network().save_weights("base.weights.h5")
moved = {}
for order in ("loaded, then enable_lora", "enable_lora, then loaded"):
    net = network()
    layer = net.layers[0]
    if order.startswith("loaded"):
        net.load_weights("base.weights.h5")
        layer.enable_lora(2)
    else:
        layer.enable_lora(2)
        net.load_weights("base.weights.h5")
    before = np.array(layer.kernel)
    net.compile("adam", "mse")
    net.fit(x, y, epochs=20, verbose=0)
    moved[order] = float(abs(np.array(layer.kernel) - before).max())
    print(f"keras {keras.__version__}: {order}: 20 epochs move the kernel by {moved[order]:.1e}")
assert moved["loaded, then enable_lora"] > 1e-3
assert moved["enable_lora, then loaded"] == 0
PY
