"""DBB's goldens: blocks, a network, internal widths other than the default."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import foldconv
from foldconv import CheckpointError
from foldconv.algebra import kernel_of
from foldconv.files.originals._blocks import renamed
from foldconv.files.originals.dbb import BLOCKS
from foldconv.lab.zoo.orepa_resnet import OREPAResNet

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# The original's own fold, but not its forward, averages with a single-precision 1/9.
NINTH = 9 * torch.tensor(1 / 9).double()


@pytest.mark.parametrize("name", ["dbb_3x3", "dbb_depthwise"])
def test_function_gradients_and_fold_are_the_originals(check_block, name):
    net, block = check_block(name, "dbb", fold_error=1e-8)
    names = BLOCKS.layer(block.state, net.conv).names
    gradients = {renamed(key, names): value for key, value in block.gradients.items() if key != "input"}
    ours = {key: parameter.grad for key, parameter in net.conv.named_parameters()}
    assert ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(ours[key], gradient, **CLOSE)


@pytest.mark.parametrize("name", ["dbb_3x3", "dbb_depthwise"])
def test_the_originals_fold_differs_by_its_rounded_average_only(import_state, golden, name):
    block = golden(name)
    net = import_state(block.state, block.plain(), "dbb")
    average = kernel_of(net.conv.body.average, in_channels=6, ndim=2).weight
    ours = foldconv.fold(net, batchnorm=True).conv.weight + (NINTH - 1) * average
    torch.testing.assert_close(ours, block.tensors["kernel"], **CLOSE)


def test_the_network_gives_its_logits_and_folds(check_network):
    plain = OREPAResNet((1, 2, 1, 1), 0.125, num_classes=10)
    net = check_network("net_dbb_basic", plain, "dbb")
    layers = foldconv.network.tree.foldable_layers(net)
    assert len(layers) == 10
    assert "stage2.0.shortcut.conv" not in layers
    assert foldconv.fold(net).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("width", [6, 18])
def test_the_internal_width_is_the_checkpoints(import_state, golden, width):
    block = golden("dbb_depthwise")
    rich = foldconv.expand(block.plain(), foldconv.DBB(internal_width=width), init="paper").eval()
    first = "idconv1" if width == 6 else "conv1"
    back = {ours: theirs for theirs, ours in BLOCKS.layer(block.state, rich.conv).names.items()}
    back |= {"body.stack.first.conv": "dbb_1x1_kxk.idconv1"}
    state = {renamed(key, back): value for key, value in rich.conv.state_dict().items()}
    assert f"dbb_1x1_kxk.{first}.weight" in state
    net = import_state(state, block.plain(), "dbb").eval()
    assert net.conv.method == foldconv.DBB(internal_width=width)
    x = block.tensors["input"].double()
    assert torch.equal(net(x), rich(x))


def test_a_checkpoint_that_the_original_has_folded(import_state, golden):
    block = golden("dbb_3x3")
    state = {"a.dbb_reparam.weight": block.tensors["kernel"], "a.dbb_reparam.bias": block.tensors["bias"]}
    net = import_state(state, nn.Sequential(OrderedDict(a=block.plain())), "dbb")
    torch.testing.assert_close(net(block.tensors["input"].double()), block.tensors["output_eval"], rtol=0, atol=1e-7)


def test_an_unknown_internal_width(import_state, golden):
    block = golden("dbb_3x3")
    state = {key: value for key, value in block.state.items() if "bn1.bn.weight" not in key}
    with pytest.raises(CheckpointError, match=r"the root: its dbb_1x1_kxk.bn1.bn.weight, which tells the internal wid"):
        import_state(state, block.plain(), "dbb")
