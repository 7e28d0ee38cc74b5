"""The networks of the MNIST demonstrations in DO-Conv's repository, one for each of its frameworks.

Origin: J. Cao et al., "DO-Conv: Depthwise Over-parameterized Convolutional Layer", TIP 2022, arXiv 2006.12030,
sample_pt.py, sample_tf.py and sample_gluoncv.py of the published code, and what these frameworks draw weights from:

    mnist_demo             three 3×3 convolutions of stride 2 with a rectifier behind each, the last one too, and
                           global average pooling; no norm, no linear layer; torch's initialization
    mnist_demo_tensorflow  3×3 convolutions to 32 and 8 channels with a rectifier behind each, one linear layer;
                           Keras' initialization (X. Glorot, Y. Bengio, AISTATS 2010, and no bias)
    mnist_demo_gluon       LeNet with hyperbolic tangents, one behind the logits too; MXNet's ``Xavier(magnitude=2.24)``

In the last two `init: preserve` keeps that initialization; `init: paper` of a method draws the weights its own way.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ._registry import register


@register
def mnist_demo(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Images (batch, in_channels, h, w) → logits (batch, num_classes).

    >>> sum(parameter.numel() for parameter in mnist_demo().parameters())
    3930
    """
    parts: list[nn.Module] = []
    for channels, filters in [(in_channels, 16), (16, 16), (16, num_classes)]:
        parts += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), nn.ReLU()]
    return _described([*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()], in_channels, num_classes)


@register
def mnist_demo_tensorflow(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Images (batch, in_channels, 28, 28) → logits (batch, num_classes), before the original's softmax.

    >>> sum(parameter.numel() for parameter in mnist_demo_tensorflow().parameters())
    48722
    """
    parts = [nn.Conv2d(in_channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.ReLU()]
    parts += [nn.Flatten(), nn.Linear(8 * 24 * 24, num_classes)]
    return _drawn(_described(parts, in_channels, num_classes), gain=1.0)


@register
def mnist_demo_gluon(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Images (batch, in_channels, 28, 28) → logits (batch, num_classes), in [-1, 1].

    >>> sum(parameter.numel() for parameter in mnist_demo_gluon().parameters())
    431080
    """
    parts = [nn.Conv2d(in_channels, 20, 5), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.Tanh()]
    parts += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(50 * 4 * 4, 500), nn.Tanh(), nn.Linear(500, num_classes)]
    # MXNet's bound is the root of magnitude / mean of the fans, Glorot's that of 3 / mean of the fans
    return _drawn(_described([*parts, nn.Tanh()], in_channels, num_classes), gain=math.sqrt(2.24 / 3))


def _described(parts: list[nn.Module], in_channels: int, num_classes: int) -> nn.Sequential:
    net: Any = nn.Sequential(*parts)
    net.default_cfg = {"input_size": (in_channels, 28, 28), "num_classes": num_classes}
    return net


def _drawn(net: nn.Sequential, gain: float) -> nn.Sequential:
    """Glorot's uniform distribution times `gain`, and no bias."""
    for module in net:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain)
            assert module.bias is not None, "all layers above have one"
            nn.init.zeros_(module.bias)
    return net
