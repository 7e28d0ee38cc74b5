"""Any method on any convolution it applies to: hypothesis draws method, shape, geometry and dtype."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import foldconv
from foldconv.algebra import kernel_of
from foldconv.network.tree import foldable_layers
from foldconv.testing import randomize

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# What one rounding to the type, of the kernel and of each product, may cost relative to the largest output.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.2}


@st.composite
def cases(draw):
    """A method, a network of one convolution with or without a norm, and an input for it."""
    method = foldconv.get_method(draw(st.sampled_from(foldconv.list_methods())))()
    ndim = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 4]))
    channels = draw(st.sampled_from([4, 8]))
    size = draw(st.tuples(*[st.integers(1, 5 if ndim < 3 else 3)] * ndim))
    square = draw(st.booleans())
    conv = CONV[ndim](
        channels,
        draw(st.sampled_from([4, 8, channels])),
        (size[0],) * ndim if square else size,
        stride=draw(st.tuples(*[st.integers(1, 2)] * ndim)),
        padding=draw(st.tuples(*[st.integers(0, 3)] * ndim)),
        dilation=draw(st.tuples(*[st.integers(1, 2)] * ndim)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    net = nn.Sequential(conv)
    if draw(st.booleans()):
        net.append(NORM[ndim](conv.out_channels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 999)))
        net = net.double().eval()
        randomize(net)
        length = max(d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size)) + 4
        x = torch.randn(1, channels, *[length] * ndim, dtype=torch.float64)
    return method, net, x, draw(st.sampled_from(list(TOLERANCE)))


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cases())
@torch.no_grad()
def test_expand_keeps_and_fold_keeps(case):
    method, net, x, dtype = case
    try:
        rich = foldconv.expand(net, method)
    except foldconv.NoMatchError:
        assume(False)
    expected = net(x)
    assert (rich(x) - expected).abs().max() <= 1e-12 * max(1, expected.abs().max())
    randomize(rich)
    ((_, layer),) = foldable_layers(rich).items()
    features = layer.feature_forward(x)
    assert (kernel_of(layer)(x) - features).abs().max() <= 1e-10 * max(1, features.abs().max())
    for batchnorm in (False, True):
        folded = foldconv.fold(rich.to(dtype), batchnorm=batchnorm)
        received, expected = folded(x.to(dtype)).double(), rich.double()(x)
        assert received.shape == expected.shape
        # The kernel is the float64 one of the rounded parameters, rounded again.
        assert (received - expected).abs().max() <= TOLERANCE[dtype] * max(1, expected.abs().max())
