#!/usr/bin/env bash
# OpenVINO's CPU plugin cuts the bias of local response normalization (LRN, AlexNet's layer) to a whole number: 1.5 counts as 1, 0.75 as 0, while the model that it has read shows 1.5 and 0.75. Who deploys such a network with a constant of its own gets other maps, and no word.
# Guessed before running: an ONNX file's LRN is right or refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 numpy==2.4.6
env/bin/python -W ignore - 2> errors <<'PY' || { tail -5 errors; exit 1; }
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper

ALPHA, BETA, SIZE = 0.5, 0.75, 3


def normalized(x, bias):
    """Its definition, in float64."""
    squares = np.pad(x**2, ((0, 0), (SIZE // 2, SIZE // 2), (0, 0), (0, 0)))
    sums = sum(squares[:, i : i + x.shape[1]] for i in range(SIZE))
    return x / (bias + ALPHA / SIZE * sums) ** BETA


print(f"onnx {version('onnx')}, onnxruntime {version('onnxruntime')}, openvino {version('openvino')}")
x = np.random.default_rng(0).standard_normal((2, 8, 6, 5))
for bias in (1.0, 2.0, 1.5, 2.75, 0.75):
    graph = helper.make_graph(
        [helper.make_node("LRN", ["x"], ["y"], alpha=ALPHA, beta=BETA, bias=bias, size=SIZE)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(file, full_check=True)
    onnx.save(file, "layer.onnx")
    right = normalized(x, bias)
    scale = np.abs(right).max()
    other = onnxruntime.InferenceSession("layer.onnx").run(None, {"x": x.astype("f")})[0]
    model = openvino.Core().read_model("layer.onnx")
    shown = [op.get_attributes()["bias"] for op in model.get_ops() if op.get_type_name() == "LRN"]
    seen = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.astype("f"))[0]
    pairs = (other, right), (seen, right), (seen, normalized(x, int(bias)))
    ort, off, cut = (np.abs(a - b).max() / scale for a, b in pairs)
    print(f"bias {bias}: ONNX Runtime {ort:.1e} off, OpenVINO {off:.1e}, {cut:.1e} from bias {int(bias)}; it shows {shown}")
    assert shown == [bias] and ort < 1e-5 and cut < 1e-5 and (off < 1e-5) == (bias == int(bias))
PY
