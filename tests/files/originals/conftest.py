"""What the tests of all block sources do with a golden."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import foldconv

GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens"
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Golden:
    """A block of the original: its arguments, state, input, outputs, gradients and its own fold."""

    def __init__(self, name):
        path = GOLDENS / f"{name}.safetensors"
        with safe_open(path, framework="pt") as file:
            self.arguments = json.loads(file.metadata()["arguments"])
        self.tensors = load_file(path)
        self.state = self.under("state.")
        self.gradients = self.under("grad.")

    def under(self, prefix):
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def plain(self):
        """The plain network in the block's place."""
        conv = nn.Conv2d(**{"kernel_size": 1, "bias": False, **self.arguments})
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels))).double()


@pytest.fixture
def golden():
    """``golden("repvgg_identity")``."""
    return Golden


@pytest.fixture
def import_state(tmp_path):
    """Import a state dict as if it were a published file."""

    def run(state, model, source, **options):
        torch.save(state, tmp_path / "checkpoint.pth")
        return foldconv.import_checkpoint(tmp_path / "checkpoint.pth", model, source=source, **options)

    return run


@pytest.fixture
def check_block(import_state):
    """Import a block and compare function, input gradient and fold; returns what was imported, gradients in place."""

    def run(name, source, after=lambda y: y, fold_error=1e-10):
        block = Golden(name)
        net, tensors = import_state(block.state, block.plain(), source), block.tensors
        x = tensors["input"].double().requires_grad_()
        torch.testing.assert_close(after(net.eval()(x)), tensors["output_eval"], **CLOSE)
        folded = foldconv.fold(net, batchnorm=True)
        torch.testing.assert_close(folded.conv.weight, tensors["kernel"], rtol=0, atol=fold_error)
        torch.testing.assert_close(folded.conv.bias, tensors["bias"], rtol=0, atol=fold_error)
        torch.testing.assert_close(after(foldconv.fold(net)(x)), tensors["output_eval"], **CLOSE)
        output = after(net.train()(x))
        torch.testing.assert_close(output, tensors["output_train"], **CLOSE)
        (output * tensors["probe"]).sum().backward()
        torch.testing.assert_close(x.grad, tensors["grad.input"], **CLOSE)
        return net, block

    return run


@pytest.fixture
def check_network():
    """Import a network, compare its logits, also folded; returns what was imported."""

    def run(name, plain, source):
        tensors = load_file(GOLDENS / f"{name}.safetensors")
        x, logits = tensors["input"].double(), tensors["logits"]
        net = foldconv.import_checkpoint(GOLDENS / f"{name}.pth.tar", plain.double(), source=source).eval()
        torch.testing.assert_close(net(x), logits, **CLOSE)
        torch.testing.assert_close(foldconv.fold(net)(x), logits, **CLOSE)
        torch.testing.assert_close(foldconv.fold(net, batchnorm=True)(x), logits, **CLOSE)
        return net

    return run
