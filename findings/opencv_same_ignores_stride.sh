#!/usr/bin/env bash
# OpenCV 5's dnn pads ONNX's auto_pad by half the kernel in front, whatever the stride, the dilation and the size: the shape is right and the values are another layer's. SAME_UPPER with stride 2 on even images, TensorFlow's "same", was right in 4.13: whose networks came from TensorFlow meets it on upgrading.
# Guessed before running: each convolution and pool is right or refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > show.py <<'PY'
import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(0)


def run(kind, size, kernel, stride, dilation, auto_pad):
    """OpenCV's output, and the specification's in float64."""
    x = random.standard_normal((1, 2, size, size))
    w = random.standard_normal((3, 2, kernel, kernel)) if kind == "Conv" else None
    out = -(-size // stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    before = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
    border = (before, total - before)
    wide = np.pad(x, ((0, 0), (0, 0), border, border), constant_values=0 if kind == "Conv" else -np.inf)
    views = np.lib.stride_tricks.sliding_window_view(wide, ((kernel - 1) * dilation + 1,) * 2, (2, 3))
    views = views[:, :, ::stride, ::stride, ::dilation, ::dilation]
    right = np.einsum("nchwij,ocij->nohw", views, w) if kind == "Conv" else views.max((4, 5))

    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "auto_pad": auto_pad}
    if dilation > 1:
        attributes["dilations"] = [dilation] * 2
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "w"] if kind == "Conv" else ["x"], ["y"], **attributes)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, right.shape)],
        [numpy_helper.from_array(w.astype("f"), "w")] if kind == "Conv" else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    network = cv2.dnn.readNetFromONNX(np.frombuffer(model.SerializeToString(), np.uint8))
    network.setInput(x.astype("f"), "x")
    return network.forward(), right


print(f"OpenCV {cv2.__version__}, onnx {onnx.__version__}")
five = cv2.__version__.startswith("5.")
for kind, size, kernel, stride, dilation, auto_pad, known in (
    ("Conv", 16, 3, 1, 1, "SAME_UPPER", True),
    ("Conv", 15, 3, 2, 1, "SAME_UPPER", True),
    ("Conv", 16, 3, 2, 1, "SAME_UPPER", not five),
    ("MaxPool", 16, 3, 2, 1, "SAME_UPPER", not five),
    ("Conv", 16, 5, 2, 1, "SAME_UPPER", not five),
    ("Conv", 16, 3, 1, 2, "SAME_UPPER", False),
    ("Conv", 16, 4, 1, 1, "SAME_LOWER", False),
):
    seen, right = run(kind, size, kernel, stride, dilation, auto_pad)
    assert seen.shape == right.shape
    off = np.abs(seen - right).max() / np.abs(right).max()
    what = f"{kind} of {kernel}x{kernel}, stride {stride}, dilation {dilation}, {auto_pad}, {size} pixels"
    print(f"{what}: {off:.1e} off")
    assert off < 1e-5 if known else off > 0.1
PY
for version in 4.13.0.92 5.0.0.93; do
    uv venv --quiet --clear --python 3.11 env
    uv pip install --quiet --python env/bin/python opencv-python-headless==$version onnx==1.23.2 numpy==2.4.6
    env/bin/python show.py 2> errors || { tail -5 errors; exit 1; }
done
