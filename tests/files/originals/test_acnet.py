"""ACNet's golden block, training and folded form."""

import pytest
import torch

import foldconv
from foldconv.files.originals._blocks import renamed
from foldconv.files.originals.acnet import BLOCKS

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def test_function_gradients_and_fold_are_the_originals(check_block):
    net, block = check_block("acb_3x3", "acnet")
    names = BLOCKS.layer({}, net.conv).names
    gradients = {renamed(key, names): value for key, value in block.gradients.items() if key != "input"}
    ours = {key: parameter.grad for key, parameter in net.conv.named_parameters()}
    assert ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(ours[key], gradient, **CLOSE)


def test_a_checkpoint_that_the_original_has_folded(import_state, golden):
    block = golden("acb_3x3")
    state = {"fused_conv.weight": block.tensors["kernel"], "fused_conv.bias": block.tensors["bias"]}
    net = import_state(state, block.plain(), "acnet")
    torch.testing.assert_close(net(block.tensors["input"].double()), block.tensors["output_eval"], **CLOSE)


def test_the_sources_are_told_apart(import_state, golden):
    block = golden("acb_3x3")
    for source in ("repvgg", "dbb", "do-conv"):
        with pytest.raises(foldconv.CheckpointError, match=f"no layer of '{source}', .* acnet; pass source='acnet'"):
            import_state(block.state, block.plain(), source)
