"""The MNIST demo of the DO-Conv paper's repository: three convolutions, plain or over-parameterized.

    python examples/mnist_pytorch.py --layer both --seeds 5 --data mnist.npz --out results.json

Conv(1→16→16→10, 3×3, stride 2, padding 1), a ReLU after each, global average pooling; SGD at 0.01 with momentum 0.9 on
batches of 32, trained on five sixths of the training images (50 000), scored after the last epoch on the others. A seed
gives both layers the same initial weights and the same order of the images. mnist.npz is Keras's file: x_train of shape
(images, 28, 28) with values from 0 to 255, y_train of shape (images,).
"""

import _mnist
import torch
from torch import nn

import foldconv


def load(path):
    """Training images and labels, then held-out images and labels; shape (images, 1, height, width)."""
    images, labels = map(torch.from_numpy, _mnist.load(path, "train"))
    split = len(images) * 5 // 6
    return images[:split, None], labels[:split], images[split:, None], labels[split:]


def network(layer, seed):
    torch.manual_seed(seed)
    parts = []
    for channels, filters in [(1, 16), (16, 16), (16, 10)]:
        parts += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), nn.ReLU()]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return foldconv.expand(net, layer) if layer != "conv" else net


def train(net, images, labels, seed, epochs, advance):
    order_of = torch.Generator().manual_seed(seed)  # of its own: what a layer draws must not change the order
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order_of).split(32):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        advance()


@torch.no_grad()
def accuracy(net, images, labels):
    """Percent of the images that the network, folded to plain convolutions, classifies right."""
    return 100 * (foldconv.fold(net.eval())(images).argmax(1) == labels).sum().item() / len(labels)


def main(arguments=None):
    about = {"epochs": 15, "packages": ("torch", "numba", "numpy"), "threads": torch.get_num_threads()}
    return _mnist.main(arguments, __doc__, (load, network, train, accuracy), **about)


if __name__ == "__main__":
    main()
