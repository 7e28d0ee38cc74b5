"""The authors' TensorFlow layer and ours: outputs and gradients."""

import json
import pathlib

import numpy as np
import pytest

import keras
from foldconv.errors import CheckpointError, UnsupportedError
from foldconv.keras import DOConv2D, import_checkpoint
from foldconv.keras.testing import gradients
from keras import ops

GOLDENS = pathlib.Path(__file__).parents[1] / "fixtures" / "goldens"


@pytest.mark.parametrize("name", ["3x3", "depthwise", "dmul12"])
def test_the_authors_layer(name, tmp_path):
    golden = np.load(GOLDENS / f"tf_doconv_{name}.npz")
    arguments = json.loads(str(golden["arguments"]).replace("'", '"').replace("False", "false"))
    plain = keras.layers.Conv2D(**{k: v for k, v in arguments.items() if k != "D_mul"})
    plain.build(golden["input"].shape)
    before = plain.get_weights()
    state = {name: golden[f"state.{name}"] for name in ("kernel", "D", "bias") if f"state.{name}" in golden}
    np.savez(tmp_path / "original.npz", **state)
    layer = import_checkpoint(tmp_path / "original.npz", plain, source="do-conv")
    assert type(layer) is DOConv2D
    for ours, theirs in zip(plain.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(import_checkpoint(state, layer, source="do-conv").weights, layer.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))
    grad, output = gradients(layer, golden["input"], golden["probe"])
    np.testing.assert_allclose(output, golden["output"], rtol=1e-4, atol=1e-5)
    taps = [grad["kernel"].reshape(9, *grad["kernel"].shape[2:])]
    taps += [grad["kernel_extra"]] if "kernel_extra" in grad else []
    np.testing.assert_allclose(np.concatenate(taps), golden["grad.kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad["D"].transpose(1, 2, 0), golden["grad.D"], rtol=1e-4, atol=1e-4)
    if layer.use_bias:
        np.testing.assert_allclose(grad["bias"], golden["grad.bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "filters", "groups", "S"), [(4, 6, 2, 9), (6, 6, 3, 20), (4, 8, 4, 11)])
def test_groups_are_paired_as_the_authors_code_does(channels, filters, groups, S):
    random = np.random.default_rng(0)
    kernel, D = random.normal(size=(S, channels // groups, filters)), random.normal(size=(9, S, channels))
    plain = keras.layers.Conv2D(filters, 3, groups=groups, use_bias=False)
    plain.build((1, 5, 5, channels))
    layer = import_checkpoint({"kernel": kernel, "D": D}, plain, source="do-conv")
    # do_conv_tensorflow.py reads its kernel, row by row, as (S, channels, filters / groups).
    expected = np.zeros((9, channels // groups, filters))
    for a in range(channels // groups):
        for b in range(filters):
            i = (a * filters + b) // (filters // groups)
            for m in range(9):
                for s in range(S):
                    one = float(s % 9 == m and s < S // 9 * 9)
                    expected[m, a, b] += (D[m, s, i] + one) * kernel[s, a, b]
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.kernel), expected.reshape(3, 3, channels // groups, filters), rtol=1e-4, atol=1e-4
    )


def test_what_does_not_fit_is_refused(tmp_path):
    layer = keras.layers.Conv2D(8, 3, name="target", use_bias=False)
    arrays = {"kernel": np.zeros((9, 4, 8)), "D": np.zeros((9, 9, 4))}
    with pytest.raises(UnsupportedError, match=r"model: expected a built Conv2D .*, received Conv2D without weights"):
        import_checkpoint(arrays, layer, "do-conv")
    layer.build((1, 5, 5, 4))
    expected = r"target: D: expected shape \(9, 9, 4\), received \(9, 9, 5\); give the layer the original's arguments"
    with pytest.raises(CheckpointError, match=expected):
        import_checkpoint({**arrays, "D": np.zeros((9, 9, 5))}, layer, "do-conv")
    with pytest.raises(CheckpointError, match=r"target: kernel: expected shape \(9, 4, 8\), received None"):
        import_checkpoint({"D": arrays["D"]}, layer, "do-conv")
    with pytest.raises(CheckpointError, match=r"target: bias: expected shape None, received \(8,\)"):
        import_checkpoint({**arrays, "bias": np.zeros(8)}, layer, "do-conv")
    with pytest.raises(UnsupportedError, match="unknown checkpoint source 'doconv'; did you mean 'do-conv'"):
        import_checkpoint(arrays, layer, "doconv")
    (tmp_path / "empty.npz").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"empty.npz: expected an .npz with kernel, D and bias"):
        import_checkpoint(tmp_path / "empty.npz", layer, "do-conv")
