#!/usr/bin/env bash
# torch.onnx.export drops the divisor_override of an average pool, by either exporter and without a word: with divisor_override=1, a sum over the window, the file gives a ninth of it. Who ships sums or weighted borders ships another network.
# Guessed before running: the exporter multiplies by the ratio, or refuses.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
env/bin/python - 2> errors <<'PY' || { tail -5 errors; exit 1; }
import warnings

import numpy as np
import onnxruntime
import torch
from torch import nn

print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
torch.manual_seed(0)
x = torch.randn(2, 3, 12, 12)
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, divisor_override=1)).eval()
right = network(x).detach().numpy()
for dynamo in (True, False):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.onnx.export(network, (x,), "network.onnx", dynamo=dynamo, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession("network.onnx")
    seen = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    about = [str(each.message) for each in heard if "divisor" in str(each.message)]
    ratio = float((right / seen).mean())
    print(f"dynamo={dynamo}: torch / file = {ratio:.4f}; warnings about it: {about}")
    assert np.allclose(seen * 9, right, atol=1e-4) and not about
PY
