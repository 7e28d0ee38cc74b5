"""Random trees of ordinary modules that have an exact kernel, for hypothesis."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import nn

from foldconv.algebra import Scale, Sum, kernel_of

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
PADS = {
    "zeros": {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d},
    "reflect": {1: nn.ReflectionPad1d, 2: nn.ReflectionPad2d, 3: nn.ReflectionPad3d},
    "replicate": {1: nn.ReplicationPad1d, 2: nn.ReplicationPad2d, 3: nn.ReplicationPad3d},
    "circular": {1: nn.CircularPad1d, 2: nn.CircularPad2d, 3: nn.CircularPad3d},
}
MODES = tuple(PADS)
CHANNELS = (2, 4)


def pairs(ndim, low, high):
    return st.tuples(*[st.tuples(st.integers(low, high), st.integers(low, high))] * ndim)


def pad(mode, widths):
    """A padding module from ``(before, after)`` per dimension; torch wants the last dimension first."""
    return PADS[mode][len(widths)](tuple(n for pair in reversed(widths) for n in pair))


@st.composite
def convolutions(draw, ndim, inputs, outputs, *, stride=None, bias=None, pointwise=False, mode=None):
    """A convolution without padding, or with its own if `mode` is given."""
    sizes = st.just(1) if pointwise else st.integers(1, 4 if ndim < 3 else 2)
    size = draw(st.tuples(*[sizes] * ndim))
    return CONV[ndim](
        inputs,
        outputs,
        size,
        stride=stride or 1,
        dilation=draw(st.tuples(*[st.integers(1, 2)] * ndim)),
        groups=draw(st.sampled_from([1, 2, math.gcd(inputs, outputs)])),
        bias=draw(st.booleans()) if bias is None else bias,
        padding=draw(st.tuples(*[st.integers(0, 2)] * ndim)) if mode else 0,
        padding_mode=mode or "zeros",
    )


@st.composite
def pointwise_layers(draw, ndim, channels):
    """A layer that acts on each position alone, bias allowed."""
    make = draw(st.sampled_from(["norm", "scale", "identity", "conv", "dropout"]))
    if make == "conv":
        return draw(convolutions(ndim, channels, draw(st.sampled_from(CHANNELS)), pointwise=True)), None
    return {
        "norm": lambda: NORM[ndim](channels, affine=draw(st.booleans()), eps=draw(st.sampled_from([1e-5, 1e-2]))),
        "scale": lambda: Scale(channels),
        "identity": nn.Identity,
        "dropout": nn.Dropout,
    }[make](), channels


@st.composite
def chains(draw, ndim, inputs, mode):
    """Padding in the first layer only, then whatever: exact by construction. Returns the tree and its channels."""
    layers: list[nn.Module] = []
    channels = inputs
    if draw(st.booleans()):
        layers.append(pad(mode, draw(pairs(ndim, 0, 2))))
    elif draw(st.booleans()):
        outputs = draw(st.sampled_from(CHANNELS))
        layers.append(draw(convolutions(ndim, channels, outputs, stride=draw(st.integers(1, 2)), mode=mode)))
        channels = outputs
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            outputs = draw(st.sampled_from(CHANNELS))
            layers.append(draw(convolutions(ndim, channels, outputs, stride=draw(st.integers(1, 2)))))
            channels = outputs
        elif draw(st.booleans()):
            layers.append(POOL[ndim](draw(st.integers(1, 2)), stride=draw(st.integers(1, 2))))
        else:
            layer, changed = draw(pointwise_layers(ndim, channels))
            layers.append(layer)
            channels = changed or layer.out_channels
    return nn.Sequential(*layers), channels


@st.composite
def branches(draw, ndim, inputs, outputs, stride, growth, mode):
    """A branch whose output is `growth` longer than its input at stride 1: padding makes up for the window."""
    kind = draw(st.sampled_from(["conv", "squeeze", "pool"]))
    if kind == "conv":
        body = [draw(convolutions(ndim, inputs, outputs, stride=stride))]
    elif kind == "squeeze":
        middle = draw(st.sampled_from(CHANNELS))
        first = draw(convolutions(ndim, inputs, middle, pointwise=True))
        body = [first, NORM[ndim](middle), draw(convolutions(ndim, middle, outputs, stride=stride))]
    else:
        body = [POOL[ndim](2, stride=stride), draw(convolutions(ndim, inputs, outputs, pointwise=True))]
    widths = []
    for i in range(ndim):
        windows = [m.dilation[i] * (m.kernel_size[i] - 1) for m in body if isinstance(m, tuple(CONV.values()))]
        total = growth[i] + sum(windows) + (1 if kind == "pool" else 0)
        before = draw(st.integers(0, max(total, 0)))
        widths.append((before, total - before))
    if any(n < 0 for pair in widths for n in pair):
        # Too short even without padding: a pointwise branch of the wanted length takes its place.
        body, widths = [draw(convolutions(ndim, inputs, outputs, stride=stride, pointwise=True))], []
        if any(growth):
            widths = [(g, 0) for g in growth]
    head = [pad(mode, tuple(widths))] if widths and any(n for pair in widths for n in pair) else []
    return nn.Sequential(*head, *body, NORM[ndim](outputs))


@st.composite
def trees(draw, ndim=None, mode=None):
    """A module tree with an exact kernel, and an input for it; float64, evaluation mode, random statistics."""
    ndim = ndim or draw(st.sampled_from([1, 2, 2, 3]))
    mode = mode or draw(st.sampled_from(MODES))
    inputs = draw(st.sampled_from(CHANNELS))
    if draw(st.booleans()):
        tree, channels = draw(chains(ndim, inputs, mode))
    else:
        channels = draw(st.sampled_from(CHANNELS))
        stride = draw(st.integers(1, 2))
        growth = draw(st.tuples(*[st.integers(0, 2)] * ndim))
        many = [draw(branches(ndim, inputs, channels, stride, growth, mode)) for _ in range(draw(st.integers(1, 3)))]
        if stride == 1 and inputs == channels and not any(growth):
            many.append(nn.Identity())
        tree = nn.Sequential(Sum(*many))
    if draw(st.booleans()):
        tree.append(draw(convolutions(ndim, channels, draw(st.sampled_from(CHANNELS)))))
    tree = tree.double().eval()
    # Large enough for the window to fit in and for reflection, which needs more input than padding.
    kernel = kernel_of(tree, in_channels=inputs, ndim=ndim)
    spatial = [
        d * (k - 1) + max(before, after, 0) + draw(st.integers(1, 4))
        for d, k, (before, after) in zip(kernel.dilation, kernel.size, kernel.padding)
    ]
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fill(tree)
        x = torch.randn(1, inputs, *spatial, dtype=torch.float64)
    return tree, x


def fill(tree):
    """Random parameters of unit scale and random norm statistics."""
    with torch.no_grad():
        for p in tree.parameters():
            p.normal_()
        for m in tree.modules():
            if isinstance(m, tuple(NORM.values())):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
