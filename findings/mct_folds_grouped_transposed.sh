#!/usr/bin/env bash
# Sony's model-compression-toolkit folds a norm into a grouped transposed convolution with the factors of other channels, as soon as a group has several inputs: calibration and quantization go through on another network, without a word. Whose decoder upsamples in groups blames eight bits for it.
# Guessed before running: its folding keeps the function for groups, or leaves the norm alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet --python 3.11 env
uv pip install --quiet --python env/bin/python model-compression-toolkit==2.6.1 torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
env/bin/python -W ignore - 2> errors <<'PY' || { tail -5 errors; exit 1; }
import copy
from importlib.metadata import version

import model_compression_toolkit
import torch
from torch import nn


def folded(network):
    """The network with its norm folded by hand: output channel after output channel, group after group."""
    network = copy.deepcopy(network)
    conv, norm = network[2], network[3]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    per_group = conv.out_channels // conv.groups
    inputs = conv.in_channels // conv.groups
    for o in range(conv.out_channels):
        group = o // per_group
        conv.weight.data[group * inputs : (group + 1) * inputs, o % per_group] *= scale[o]
    conv.bias.data = (conv.bias - norm.running_mean) * scale + norm.bias
    return nn.Sequential(*(part for part in network if part is not norm)).eval()


def quantized(network, images):
    model, _ = model_compression_toolkit.ptq.pytorch_post_training_quantization(
        copy.deepcopy(network), lambda: iter([[images]])
    )
    return model.cpu().eval()(images).detach()


def distance(a, b):
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


print(f"model-compression-toolkit {version('model-compression-toolkit')}, torch {torch.__version__}")
for inputs, outputs, groups in ((8, 4, 1), (8, 8, 8), (8, 4, 4), (12, 4, 4)):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(outputs)
    norm.weight.data = torch.linspace(0.3, 2.5, outputs)
    norm.running_mean.data = torch.randn(outputs) / 5
    norm.running_var.data = torch.linspace(1, 0.2, outputs)
    norm.bias.data = torch.randn(outputs) / 5
    up = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, groups=groups)
    network = nn.Sequential(nn.Conv2d(3, inputs, 1), nn.ReLU(), up, norm, nn.ReLU()).eval()
    images = torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        right = network(images)
        assert distance(folded(network.double())(images.double()), network(images.double())) < 1e-12
        network.float()
        by_hand, by_tool = (distance(quantized(each, images), right) for each in (folded(network), network))
    print(f"{inputs} to {outputs} channels in {groups} groups: int8 {by_hand:.1%} off if folded by hand, else {by_tool:.1%}")
    assert by_hand < 0.05
    assert by_tool > 0.1 if 1 < groups < inputs else by_tool < 0.05
PY
