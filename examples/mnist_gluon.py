"""The Gluon MNIST demo of the DO-Conv paper's repository: two convolutions, plain or over-parameterized.

    python examples/mnist_gluon.py --layer both --seeds 5 --data mnist.npz --out results.json

Conv(20, 5×5), tanh, max pooling by 2, Conv(50, 5×5), tanh, max pooling by 2, Dense(500), tanh, Dense(10), tanh;
Xavier initialization of magnitude 2.24; SGD at 0.03 without momentum on batches of 100. Trained on x_train (60 000),
scored after the last epoch on x_test (10 000), folded. A seed gives both layers the same initial weights and the same
order of the images.
"""

import _mnist
import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn

import foldconv.gluon


def load(path):
    """Training images and labels, then test images and labels; shape (images, 1, height, width)."""
    x, y, test_x, test_y = map(mx.nd.array, _mnist.load(path, "train", "test"))
    return x.expand_dims(1), y, test_x.expand_dims(1), test_y


def network(layer, seed):
    mx.random.seed(seed)
    net = nn.HybridSequential()
    for channels in (20, 50):
        net.add(nn.Conv2D(channels, 5, activation="tanh"), nn.MaxPool2D(2, 2))
    net.add(nn.Flatten(), nn.Dense(500, activation="tanh"), nn.Dense(10, activation="tanh"))
    net.initialize(mx.init.Xavier(magnitude=2.24))
    net(mx.nd.zeros((1, 1, 28, 28)))  # shapes wait for an input, and with them the draw
    return foldconv.gluon.expand(net, layer) if layer != "conv" else net


def train(net, images, labels, seed, epochs, advance):
    net.hybridize(static_alloc=True)
    loss_of = gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.03})
    for order in _mnist.orders(len(images), seed, epochs):
        for start in range(0, len(order), 100):
            batch = mx.nd.array(order[start : start + 100], dtype="int32")
            with autograd.record():
                loss = loss_of(net(images.take(batch)), labels.take(batch))
            loss.backward()
            trainer.step(len(batch))
        mx.nd.waitall()
        advance()


def accuracy(net, images, labels):
    """Percent of the images that the network, folded to plain convolutions, classifies right."""
    plain = foldconv.gluon.fold(net)
    parts = [slice(start, start + 500) for start in range(0, len(images), 500)]
    right = [(plain(images[part]).argmax(axis=1) == labels[part]).sum().asscalar() for part in parts]
    return 100 * int(sum(right)) / len(labels)


def main(arguments=None):
    about = {"epochs": 10, "packages": ("mxnet", "numpy"), "threads": _mnist.threads_of("OMP_NUM_THREADS")}
    return _mnist.main(arguments, __doc__, (load, network, train, accuracy), **about)


if __name__ == "__main__":
    main()
