"""A block of one's own: train it with branches, deploy one convolution, register nothing.

python examples/own_block.py
"""

import torch
from torch import nn

import foldconv
from foldconv.algebra import Scale, Sum, kernel_of


def conv_norm(channels, size):
    return nn.Sequential(nn.Conv2d(channels, channels, size, padding=size // 2, bias=False), nn.BatchNorm2d(channels))


def block(channels):
    """Any linear idea, in ordinary modules: here two sizes, a blurred branch and a scaled shortcut."""
    # Padding after a norm has no exact kernel at the borders and would be refused: pad in front.
    blurred = nn.Sequential(nn.ZeroPad2d(1), conv_norm(channels, 1), nn.AvgPool2d(3, stride=1))
    return foldconv.FoldableBlock(
        Sum(wide=conv_norm(channels, 5), narrow=conv_norm(channels, 3), blurred=blurred, shortcut=Scale(channels, 0.5))
    )


def main():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), block(8), nn.ReLU(), block(8))
    optimizer = torch.optim.SGD(foldconv.parameter_groups(net, weight_decay=1e-4), lr=0.1)
    for _ in range(5):
        x = torch.randn(8, 3, 16, 16)
        loss = (net(x) - x.mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    plain = foldconv.fold(net)
    print(plain)
    report = foldconv.verify(net, plain, torch.randn(2, 3, 16, 16))
    print(report)
    # Without a wrapper, a tree of modules is also a value to compute with.
    print(kernel_of(net[2]).then(kernel_of(nn.Conv2d(8, 4, 1))).weight.shape)
    return report


if __name__ == "__main__":
    main()
