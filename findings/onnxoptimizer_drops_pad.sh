#!/usr/bin/env bash
# onnxoptimizer's default passes move a Pad into the pads of the pool behind it and leave the pool's auto_pad: VALID or SAME_UPPER, under which a runtime ignores pads, so the border is gone and the maps are smaller. Where a global pool follows, the network runs on, with other logits.
# Guessed before running: the network stays the same function, as it does with a convolution there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python onnx==1.23.2 onnxruntime==1.32.0 onnxoptimizer==0.4.2 numpy==2.4.6
env/bin/python -W ignore - 2> errors <<'PY' || { tail -5 errors; exit 1; }
from importlib.metadata import version

import numpy as np
import onnx
import onnxoptimizer
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(0)
weight = random.standard_normal((4, 3, 3, 3)).astype("f")
images = random.uniform(0, 1, (2, 3, 16, 16)).astype("f")


def network(kind, auto_pad):
    """A zero border, `kind`, and the mean over the map."""
    asked = {"auto_pad": auto_pad} if auto_pad else {}
    inputs = ["bordered", "weight"] if kind == "Conv" else ["bordered"]
    initializers = [numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "border")]
    if kind == "Conv":
        initializers.append(numpy_helper.from_array(weight, "weight"))
    graph = helper.make_graph(
        [
            helper.make_node("Pad", ["images", "border"], ["bordered"]),
            helper.make_node(kind, inputs, ["maps"], kernel_shape=[3, 3], strides=[2, 2], **asked),
            helper.make_node("GlobalAveragePool", ["maps"], ["means"]),
        ],
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, images.shape)],
        [helper.make_tensor_value_info("means", TensorProto.FLOAT, [2, 4 if kind == "Conv" else 3, 1, 1])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def expected(kind, auto_pad):
    """The same in NumPy and float64."""
    bordered = np.pad(images.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
    if auto_pad == "SAME_UPPER":  # 18 pixels to 9: one more behind, which pools leave out
        fill = {"Conv": 0, "MaxPool": -np.inf, "AveragePool": np.nan}[kind]
        bordered = np.pad(bordered, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(bordered, (3, 3), (2, 3))[:, :, ::2, ::2]
    if kind == "Conv":
        maps = np.einsum("nchwij,ocij->nohw", windows, weight)
    else:
        maps = (np.max if kind == "MaxPool" else np.nanmean)(windows, (4, 5))
    return maps.mean((2, 3), keepdims=True)


def run(model):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": images})[0]


print(f"onnxoptimizer {version('onnxoptimizer')}, onnx {version('onnx')}, onnxruntime {version('onnxruntime')}")
for kind in ("Conv", "AveragePool", "MaxPool"):
    for auto_pad in (None, "VALID", "SAME_UPPER"):
        model, right = network(kind, auto_pad), expected(kind, auto_pad)
        optimized = onnxoptimizer.optimize(model)
        onnx.checker.check_model(optimized, full_check=True)
        nodes = [node.op_type for node in optimized.graph.node]
        before, after = (np.abs(run(each) - right).max() / np.abs(right).max() for each in (model, optimized))
        print(f"Pad, {kind}, auto_pad {auto_pad}: {before:.1e} off before, {after:.1e} after, as {nodes}")
        assert before < 1e-5
        assert after > 0.02 and "Pad" not in nodes if auto_pad and kind != "Conv" else after < 1e-5
PY
