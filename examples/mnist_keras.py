"""The TensorFlow MNIST demo of the DO-Conv paper's repository, in Keras: two convolutions, plain or over-parameterized.

    python examples/mnist_keras.py --layer both --seeds 10 --data mnist.npz --out results.json

Conv(32, 3×3) and Conv(8, 3×3), valid, a ReLU after each; Flatten; Dense(10) with softmax. Adam with its defaults on
batches of 32, trained on x_train (60 000), scored after the last epoch on x_test (10 000), folded. A seed gives both
layers the same initial weights and the same order of the images. KERAS_BACKEND chooses the backend.
"""

import _mnist
import numpy as np

import foldconv.keras
import keras
from keras import layers


def load(path):
    """Training images and labels, then test images and labels; shape (images, height, width, 1)."""
    x, y, test_x, test_y = _mnist.load(path, "train", "test")
    return x[..., None], y, test_x[..., None], test_y


def network(layer, seed):
    keras.utils.set_random_seed(seed)
    parts = [layers.Conv2D(32, 3, activation="relu"), layers.Conv2D(8, 3, activation="relu")]
    net = keras.Sequential([keras.Input((28, 28, 1)), *parts, layers.Flatten(), layers.Dense(10, activation="softmax")])
    return foldconv.keras.expand(net, layer) if layer != "conv" else net


def train(net, images, labels, seed, epochs, advance):
    backend = keras.backend.backend()
    # Steps in bundles spare Python's part of all but one. XLA is JAX's compiler; on a CPU it slows TensorFlow down.
    compiled = {"steps_per_execution": 25 if backend == "tensorflow" else 1, "jit_compile": backend == "jax"}
    net.compile(optimizer="adam", loss="sparse_categorical_crossentropy", **compiled)
    for order in _mnist.orders(len(images), seed, epochs):
        net.fit(images[order], labels[order], batch_size=32, shuffle=False, verbose=0)
        advance()


def accuracy(net, images, labels):
    """Percent of the images that the network, folded to plain convolutions, classifies right."""
    plain = foldconv.keras.fold(net)
    parts = [slice(start, start + 500) for start in range(0, len(images), 500)]
    scores = [keras.ops.convert_to_numpy(plain(images[part])) for part in parts]  # compiling takes longer than these
    return 100 * int(np.sum(np.concatenate(scores).argmax(1) == labels)) / len(labels)


def main(arguments=None):
    backend = keras.backend.backend()
    threads = _mnist.threads_of("TF_NUM_INTRAOP_THREADS" if backend == "tensorflow" else "OMP_NUM_THREADS")
    about = {"epochs": 5, "packages": ("keras", backend, f"{backend}-cpu", "numpy"), "threads": threads}
    return _mnist.main(arguments, __doc__, (load, network, train, accuracy), **about)


if __name__ == "__main__":
    main()
