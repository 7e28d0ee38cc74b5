"""The MNIST demo in Keras: the paper's network, paired runs, a folded score."""

import json

import numpy as np
import pytest

import keras
from foldconv.keras import DOConv2D


@pytest.fixture(scope="module")
def example(import_example):
    return import_example("mnist_keras")


def weights(net):
    """By the layer's place and the weight's name."""
    named = {f"{place}.{weight.name}": weight for place, layer in enumerate(net.layers) for weight in layer.weights}
    return {name: np.array(weight) for name, weight in named.items()}


def test_the_network_is_the_papers(example):
    net = example.network("doconv", 0)
    kinds = [type(layer) for layer in net.layers]
    assert kinds == [DOConv2D, DOConv2D, keras.layers.Flatten, keras.layers.Dense]
    assert net.layers[2].input.shape[1:] == (24, 24, 8)  # two valid convolutions of 3×3
    activations = [layer.activation.__name__ for layer in net.layers if hasattr(layer, "activation")]
    assert activations == ["relu", "relu", "softmax"]
    assert example.network("conv", 0).count_params() == 320 + 2312 + 46090


def test_the_same_seed_gives_the_same_weights_and_the_same_start(example):
    nets = [example.network(*given) for given in (("conv", 3), ("doconv", 3), ("conv", 4))]
    conv, doconv, other = map(weights, nets)
    extra = doconv.keys() - conv.keys()
    assert extra == {"0.D", "1.D"}
    assert not any(doconv[name].any() for name in extra)
    for name, value in conv.items():
        np.testing.assert_array_equal(value, doconv[name])
        assert not value.any() or (value != other[name]).any()  # biases start at zero
    x = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    outputs = [keras.ops.convert_to_numpy(net(x)) for net in nets[:2]]
    np.testing.assert_allclose(*outputs, atol=1e-6)


@pytest.mark.parametrize("layer", ["conv", "doconv"])
def test_training_takes_the_images_in_the_seeds_order(example, layer):
    """Two epochs of the demo against steps by hand; draws in between leave the order alone."""
    random = np.random.default_rng(0)
    images, labels = random.random((40, 28, 28, 1), np.float32), random.integers(0, 10, 40)
    net, by_hand = example.network(layer, 7), example.network(layer, 7)
    keras.random.normal((5,))
    advanced = []
    example.train(net, images, labels, 7, 2, lambda: advanced.append(1))
    assert len(advanced) == 2
    assert int(net.optimizer.iterations) == 4  # none is lost where a bundle of steps is not full
    compiled = {"loss": "sparse_categorical_crossentropy", "jit_compile": keras.backend.backend() == "jax"}
    by_hand.compile(optimizer=keras.optimizers.Adam(0.001), **compiled)
    for order in example._mnist.orders(40, 7, 2):
        for batch in np.split(order, [32]):
            by_hand.train_on_batch(images[batch], labels[batch])
    start, expected = weights(example.network(layer, 7)), weights(by_hand)
    for name, value in weights(net).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4)
        assert np.abs(value - start[name]).max() > 1e-3


def test_training_learns_and_the_score_is_of_the_folded_network(example, stripes, monkeypatch):
    x, y, test_x, test_y = example.load(stripes)
    assert (x.shape, test_x.shape, float(x.max()) <= 1) == ((600, 28, 28, 1), (100, 28, 28, 1), True)
    with np.load(stripes) as file:
        np.testing.assert_array_equal(test_y, file["y_test"])
    before = example.accuracy(example.network("doconv", 0), test_x, test_y)
    net = example.network("doconv", 0)
    example.train(net, x, y, 0, 3, lambda: None)
    folded, fold = [], example.foldconv.keras.fold
    monkeypatch.setattr(example.foldconv.keras, "fold", lambda given: folded.append(fold(given)) or folded[-1])
    assert example.accuracy(net, test_x, test_y) > max(before, 90)
    assert not any(isinstance(layer, DOConv2D) for layer in folded[0].layers)
    assert all(np.abs(np.array(layer.D)).max() > 0 for layer in net.layers[:2])
    outputs = [keras.ops.convert_to_numpy(given(test_x)) for given in (folded[0], net)]
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_the_table_says_what_the_file_says(example, stripes, tmp_path, capsys):
    out = tmp_path / "results.json"
    report = example.main(["--seeds", "1", "--epochs", "1", "--data", str(stripes), "--out", str(out)])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written == report
    assert (written["images"], written["held_out"], written["seeds"]) == (600, 100, [0])
    assert {"keras", "numpy"} < written["versions"].keys()
    printed = capsys.readouterr().out
    for name in ("conv", "doconv"):
        (value,) = written["accuracies"][name]
        assert f"| {name} | {value:.3f} | – |" in printed


def test_a_file_without_test_images_is_refused_in_one_line(example, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", x_train=np.zeros((2, 28, 28), "u1"), y_train=np.zeros(2, "u1"))
    with pytest.raises(SystemExit):
        example.main(["--data", str(tmp_path / "other.npz")])
    assert (
        "expected arrays x_train, y_train, x_test, y_test, received x_train, y_train"
        in (capsys.readouterr().err.splitlines()[-1])
    )
