"""The parameters of tests/fixtures/parity.npz in Gluon; tests/parity does the same in PyTorch, tests/keras in Keras."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from foldconv.gluon import DOConv2D

from ..parity import write_parity


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 3e-5)])
@pytest.mark.parametrize("case", write_parity.CASES)
def test_gluon(case, dtype, tolerance, hybrid):
    values, settings = write_parity.read(case)
    layer = DOConv2D(
        settings["out"],
        settings["kernel"],
        strides=(settings["stride"],) * 2,
        padding=settings["padding"],
        dilation=(settings["dilation"],) * 2,
        groups=settings["groups"],
        use_bias=settings["bias"],
        in_channels=settings["channels"],
        depth_multiplier=settings["multiplier"],
    )
    layer.cast(dtype)
    layer.initialize()
    if hybrid:
        layer.hybridize()
    state = {n.removeprefix("state."): v for n, v in values.items() if n.startswith("state.")}
    assert set(state) == set(layer._reg_params)
    for name, value in state.items():
        layer._reg_params[name].set_data(mx.nd.array(value, dtype=dtype))
    x = mx.nd.array(values["input"], dtype=dtype)
    x.attach_grad()
    with autograd.record():
        y = layer(x)
        loss = (y * mx.nd.array(values["probe"], dtype=dtype)).sum()
    loss.backward()
    found = {"output": y, "kernel": layer.fold().weight.data(), "grad.input": x.grad}
    found |= {f"grad.{name}": parameter.grad() for name, parameter in layer._reg_params.items()}
    assert set(found) == {name for name in values if name.startswith(("grad.", "output", "kernel"))}
    for name, value in found.items():
        assert value.dtype == np.dtype(dtype)
        bound = 10 * tolerance if name.startswith("grad.") else tolerance
        np.testing.assert_allclose(value.asnumpy(), values[name], rtol=bound, atol=bound, err_msg=name)
