"""Damaged blocks of every source: whatever a tensor's shape has become, the answer is one line that names it."""

import re

import pytest
import torch
from torch import nn

import foldconv
from foldconv import CheckpointError

BLOCKS = {
    "repvgg_identity": "repvgg",
    "dbb_3x3": "dbb",
    "dbb_depthwise": "dbb",
    "acb_3x3": "acnet",
    "orepa_1x1": "orepa",
    "orepa_3x3_stride2_group2": "orepa",
    "orepa_large_7x7": "orepa",
    "orepa_large_base_7x7": "orepa",
    "orepa_vgg_identity": "orepa",
    "dgconv_8": "dgconv",
}
CONSTANTS = ("id_tensor", "prior", "avg_avg", "D", "I")


def plain(block):
    arguments = {key: value for key, value in block.arguments.items() if key != "sort"}
    return nn.Conv2d(**arguments) if "gate" in block.state else block.plain()


@pytest.mark.parametrize("name", BLOCKS)
def test_no_shape_of_a_tensor_is_taken_or_breaks_the_import(import_state, golden, name):
    block = golden(name)
    for key, value in block.state.items():
        if key.endswith("num_batches_tracked"):
            continue
        for damaged in (torch.ones(()), torch.ones(7), value[..., :0], value.unsqueeze(0)):
            if damaged.shape == value.shape or key.endswith("id_tensor") or key in "DI":
                continue  # constants of the original's code
            with pytest.raises(CheckpointError) as error:
                import_state(block.state | {key: damaged}, plain(block), BLOCKS[name])
            if key != "dbb_1x1_kxk.bn1.bn.weight":  # tells the internal width, so the others seem wrong
                assert key in str(error.value), (key, damaged.shape)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BLOCKS)
def test_each_missing_tensor_is_named(import_state, golden, name):
    block = golden(name)
    for key in block.state:
        rest = {other: value for other, value in block.state.items() if other != key}
        if key.endswith(("num_batches_tracked", *CONSTANTS)):
            import_state(rest, plain(block), BLOCKS[name])
        else:
            with pytest.raises(CheckpointError) as error:
                import_state(rest, plain(block), BLOCKS[name])
            # Without what it is recognized by, a block is none.
            assert key in str(error.value) or re.search(r"origin|(dense|square).*conv.weight|weight0|gate", key), key


@pytest.mark.parametrize("name", BLOCKS)
def test_importing_leaves_the_plain_network_and_the_tensors_alone(import_state, golden, name):
    block = golden(name)
    net = plain(block).double()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    imported = import_state(block.state, net, BLOCKS[name])
    assert imported is not net
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert not foldconv.network.tree.foldable_layers(net)
