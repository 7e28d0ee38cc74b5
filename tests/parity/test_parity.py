"""One set of parameters through an independent NumPy evaluation and PyTorch; tests/keras and tests/gluon do the same.

The fixture holds what `write_parity` computes from the paper's sums in float64.
"""

import numpy as np
import pytest
import torch

import foldconv

from . import write_parity


def near(received, wanted, tolerance=1e-10):
    np.testing.assert_allclose(received.detach().numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("composition", ["kernel", "feature"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("case", write_parity.CASES)
def test_torch(case, dtype, tolerance, composition):
    values, settings = write_parity.read(case)
    geometry = {name: settings[name] for name in ("stride", "padding", "dilation", "groups", "bias")}
    layer = foldconv.DOConv2d(
        settings["channels"],
        settings["out"],
        settings["kernel"],
        **geometry,
        depth_multiplier=settings["multiplier"],
        composition=composition,
        dtype=dtype,
    )
    state = {n.removeprefix("state."): torch.tensor(v) for n, v in values.items() if n.startswith("state.")}
    layer.load_state_dict(state)
    x = torch.tensor(values["input"], dtype=dtype, requires_grad=True)
    y = layer(x)
    (y * torch.tensor(values["probe"])).sum().backward()
    near(y, values["output"], tolerance)
    near(layer.kernel(), values["kernel"], tolerance)
    near(layer.fold().weight, values["kernel"], tolerance)
    near(x.grad, values["grad.input"], tolerance)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert {f"grad.{name}" for name in gradients} | {"grad.input"} == {n for n in values if n.startswith("grad.")}
    for name, gradient in gradients.items():
        near(gradient, values[f"grad.{name}"], 10 * tolerance)


def test_the_fixture_is_what_the_script_computes():
    computed = write_parity.compute()
    with np.load(write_parity.TARGET) as file:
        assert set(file) == set(computed)
        for name in file:
            np.testing.assert_allclose(file[name], computed[name], rtol=1e-12, atol=1e-12)
