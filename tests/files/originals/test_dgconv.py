"""DGConv's goldens: blocks with and without sorting, and the network."""

import re

import pytest
import torch
from torch import nn

import foldconv
from foldconv import CheckpointError, UnsupportedError
from foldconv.lab.zoo import GResNeXt
from foldconv.methods.dgconv import complexity

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def plain(block):
    arguments = {key: value for key, value in block.arguments.items() if key != "sort"}
    return nn.Conv2d(**arguments).double()


@pytest.mark.parametrize(("name", "options"), [("dgconv_8", {}), ("dgconv_16_sorted", {"sort": True})])
def test_function_gradients_and_fold_are_the_originals(import_state, golden, name, options):
    block = golden(name)
    layer, tensors = import_state(block.state, plain(block), "dgconv", **options), block.tensors
    assert layer.method == foldconv.DGConv(**options)
    assert layer.complexity().item() == tensors["regularizer"].item()
    x = tensors["input"].double().requires_grad_()
    torch.testing.assert_close(layer.eval()(x), tensors["output_eval"], **CLOSE)
    folded = foldconv.fold(layer)
    assert folded.groups > 1
    torch.testing.assert_close(folded(x), tensors["output_eval"], **CLOSE)
    output = layer.train()(x)
    torch.testing.assert_close(output, tensors["output_train"], **CLOSE)
    (output * tensors["probe"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad.input"], **CLOSE)
    renamed = {"weight": "conv.weight", "bias": "conv.bias", "gates": "gate"}
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, block.gradients[renamed[key]], **CLOSE)


def network():
    return GResNeXt((1, 1), groups=2, width_per_group=4, num_classes=10)


def test_the_network_gives_its_logits_and_folds(check_network):
    net = check_network("net_g_resnext", network(), "dgconv")
    assert [type(net.layer1[0].conv2), type(net.layer2[0].conv2)] == [foldconv.DGConv2d] * 2
    assert complexity(net).item() == 40
    assert foldconv.fold(net).layer2[0].conv2.groups == 8


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"gate": torch.tensor([1.0, 0.0, -1.0])}, {}, CheckpointError, "the root: a gate is exactly 0, which"),
        ({"gate": torch.ones(4)}, {}, CheckpointError, "1 misshapen: gate (expected (3,), received (4,)); nothing"),
        ({"conv.weight": torch.ones(1)}, {}, CheckpointError, "1 misshapen: conv.weight (expected (8, 8, 3, 3), rec"),
        ({"conv.bias": None}, {}, CheckpointError, "1 missing: conv.bias; nothing was loaded"),
        ({}, {"sorted": True}, UnsupportedError, "method 'dgconv': unknown option 'sorted'; did you mean 'sort'?"),
    ],
)
def test_what_does_not_fit(import_state, golden, change, options, error, message):
    block = golden("dgconv_8")
    state = {key: value for key, value in (block.state | change).items() if value is not None}
    with pytest.raises(error, match=re.escape(message)):
        import_state(state, plain(block), "dgconv", **options)


def test_sources_without_options_say_so(import_state):
    state = {"W": torch.zeros(1, 1, 1)}
    with pytest.raises(UnsupportedError, match=r"source 'do-conv' takes no options, received \{'sort': True\}"):
        import_state(state, nn.Conv2d(1, 1, 1), "do-conv", sort=True)
