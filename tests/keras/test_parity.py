"""One set of parameters in torch and in Keras, whatever Keras' backend."""

import numpy as np
import pytest
import torch

import foldconv
from foldconv.keras import DOConv2D
from keras import ops

from .test_goldens import gradients


def near(ours, torchs):
    np.testing.assert_allclose(ours, torchs.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "multiplier"), [(1, 9), (2, 9), (2, 12), (4, 11)])
def test_torch_and_keras_agree(groups, multiplier):
    random = np.random.default_rng(0)
    theirs = foldconv.DOConv2d(4, 8, 3, groups=groups, depth_multiplier=multiplier)
    for parameter in theirs.parameters():
        parameter.data = torch.from_numpy(0.2 * random.normal(size=parameter.shape).astype("float32"))
    x = random.normal(size=(2, 7, 7, 4)).astype("float32")
    probe = random.normal(size=(2, 5, 5, 8)).astype("float32") / 8
    ours = DOConv2D(8, 3, groups=groups, depth_multiplier=multiplier)
    ours.build(x.shape)

    def keras_form(tensors):
        values = {"kernel": tensors["weight"].permute(2, 3, 1, 0), "bias": tensors["bias"], "D": tensors["D"]}
        if "weight_extra" in tensors:
            values["kernel_extra"] = tensors["weight_extra"].permute(2, 1, 0)
        return values

    values = keras_form(dict(theirs.named_parameters()))
    for variable in ours.weights:
        variable.assign(values[variable.name].detach().numpy())
    y = theirs(torch.from_numpy(x).permute(0, 3, 1, 2))
    (y * torch.from_numpy(probe).permute(0, 3, 1, 2)).sum().backward()
    grad, output = gradients(ours, x, probe)
    near(output, y.permute(0, 2, 3, 1))
    expected = keras_form({name: p.grad for name, p in theirs.named_parameters()})
    assert grad.keys() == expected.keys()
    for name in grad:
        near(grad[name], expected[name])
    folded = theirs.fold().weight.permute(2, 3, 1, 0)
    near(ops.convert_to_numpy(ours.kernel), folded)
    near(ops.convert_to_numpy(ours.fold().kernel), folded)
