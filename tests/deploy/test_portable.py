import copy

import pytest
import torch
from torch import nn

from foldconv.algebra.convolutions import PLAIN
from foldconv.deploy.formats import FORMATS
from foldconv.deploy.portable import kinds_of, portable
from foldconv.layers.permuted import PermutedConv1d, PermutedConv2d


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 6, (3, 5), stride=2, padding=(0, 2), groups=2, padding_mode="circular"),
        nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular", bias=False),
        nn.Conv3d(2, 3, 3, padding=(1, 0, 2), dilation=(1, 1, 2), padding_mode="circular"),
        PermutedConv1d(4, 4, 3, groups=2, input_order=[2, 0, 3, 1]),
        PermutedConv2d(
            *(4, 4, 3),
            padding=1,
            padding_mode="circular",
            groups=2,
            input_order=[2, 0, 3, 1],
            output_order=[1, 3, 0, 2],
        ),
    ],
    ids=str,
)
def test_rewritten_convolutions_compute_the_same_in_plain_words(conv):
    net = nn.Sequential(conv, nn.ReLU()).double()
    ncnn = FORMATS[".param"]
    x = torch.randn(2, conv.in_channels, *(9, 10, 11)[: len(conv.kernel_size)], dtype=torch.float64)
    rewritten = portable(copy.deepcopy(net), ncnn)
    assert (rewritten(x) - net(x)).abs().max() < 1e-14
    assert not [
        m for m in rewritten.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) and kinds_of(m, ncnn)
    ]


@pytest.mark.parametrize(
    "conv",
    [
        nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2),
        nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=(0, 1), dilation=(2, 3), groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=(1, 2), dilation=2, padding=1, output_padding=(1, 0), bias=False),
        nn.Conv3d(4, 8, 3, padding=1, groups=2, padding_mode="replicate"),
        nn.Conv3d(4, 4, (1, 3, 2), stride=2, dilation=2, groups=4, bias=False),
    ],
    ids=str,
)
def test_kernels_with_zeros_and_groups_apart_compute_the_same(conv):
    litert = FORMATS[".tflite"]
    x = torch.randn(2, 4, *(9, 10, 11)[: len(conv.kernel_size)], dtype=torch.float64)
    expected = conv.double()(x)
    rewritten = portable(nn.Sequential(conv), litert)
    assert rewritten[0] is not conv
    assert (rewritten(x) - expected).abs().max() < 1e-14
    assert not [m for m in rewritten.modules() if isinstance(m, PLAIN) and kinds_of(m, litert)]


def test_what_a_runtime_takes_stays():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.ReLU())
    assert portable(net, FORMATS[".onnx"])[0] is net[0]


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 5), (2, 4, 5, 3), (2, 4, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("parameters", [1, 4])
def test_prelu_of_any_rank(shape, parameters):
    """XNNPACK's takes four dimensions, and its converter fails at others without a layer's name."""
    net = nn.Sequential(nn.PReLU(parameters)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(parameters))
    x = torch.randn(shape, dtype=torch.float64)
    rewritten = portable(copy.deepcopy(net), FORMATS[".pte"])
    assert torch.equal(rewritten(x), net(x))
    exported = torch.export.export(rewritten, (x,)).graph.nodes
    assert any("prelu" in str(node.target) for node in exported) == (len(shape) == 4)
