"""The MNIST demo in Gluon: the paper's network, paired runs, a folded score."""

import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from foldconv.gluon import DOConv2D


@pytest.fixture(scope="module")
def example(import_example):
    return import_example("mnist_gluon")


def values(net):
    return {name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()}


def test_the_network_is_the_papers(example):
    net = example.network("doconv", 0)
    kinds = [DOConv2D, gluon.nn.MaxPool2D, DOConv2D, gluon.nn.MaxPool2D, gluon.nn.Flatten, gluon.nn.Dense]
    assert [type(layer) for layer in net] == [*kinds, gluon.nn.Dense]
    shapes = {name: value.shape for name, value in values(example.network("conv", 0)).items()}
    assert shapes == {
        **{"0.weight": (20, 1, 5, 5), "0.bias": (20,), "2.weight": (50, 20, 5, 5), "2.bias": (50,)},
        **{"5.weight": (500, 800), "5.bias": (500,), "6.weight": (10, 500), "6.bias": (10,)},
    }
    assert float(abs(net(100 * mx.nd.random.normal(shape=(4, 1, 28, 28)))).max().asscalar()) <= 1  # the last tanh
    limit = (2.24 / ((20 + 50) * 25 / 2)) ** 0.5  # of Xavier's uniform draw
    assert 0.95 * limit < abs(values(net)["2.weight"]).max() <= limit


def test_the_same_seed_gives_the_same_weights_and_the_same_start(example):
    nets = [example.network(*given) for given in (("conv", 3), ("doconv", 3), ("conv", 4))]
    conv, doconv, other = map(values, nets)
    extra = doconv.keys() - conv.keys()
    assert extra == {"0.D", "2.D"}
    assert not any(doconv[name].any() for name in extra)
    for name, value in conv.items():
        np.testing.assert_array_equal(value, doconv[name])
        assert not value.any() or (value != other[name]).any()  # biases start at zero
    x = mx.nd.random.uniform(shape=(2, 1, 28, 28))
    np.testing.assert_allclose(nets[0](x).asnumpy(), nets[1](x).asnumpy(), atol=1e-6)


@pytest.mark.parametrize("layer", ["conv", "doconv"])
def test_training_takes_the_images_in_the_seeds_order(example, layer):
    """Two epochs of the demo against steps by hand; draws in between leave the order alone."""
    mx.random.seed(0)
    images, labels = mx.nd.random.uniform(shape=(250, 1, 28, 28)), mx.nd.arange(250) % 10
    net, by_hand = example.network(layer, 7), example.network(layer, 7)
    mx.nd.random.normal(shape=(5,))
    advanced = []
    example.train(net, images, labels, 7, 2, lambda: advanced.append(1))
    assert len(advanced) == 2
    parameters = list(by_hand.collect_params().values())
    for order in example._mnist.orders(250, 7, 2):
        for batch in np.split(order, [100, 200]):
            x, y = (mx.nd.array(array.asnumpy()[batch]) for array in (images, labels))
            with autograd.record():
                loss = -mx.nd.pick(mx.nd.log_softmax(by_hand(x)), y).mean()
            loss.backward()
            for parameter in parameters:  # no momentum
                parameter.set_data(parameter.data() - 0.03 * parameter.grad())
    start, expected = values(example.network(layer, 7)), values(by_hand)
    for name, value in values(net).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5)
        assert abs(value - start[name]).max() > 1e-4


def test_training_learns_and_the_score_is_of_the_folded_network(example, stripes, monkeypatch):
    x, y, test_x, test_y = example.load(stripes)
    assert (x.shape, test_x.shape, float(x.max().asscalar()) <= 1) == ((600, 1, 28, 28), (100, 1, 28, 28), True)
    with np.load(stripes) as file:
        np.testing.assert_array_equal(test_y.asnumpy(), file["y_test"])
    net = example.network("doconv", 0)
    before = example.accuracy(net, test_x, test_y)
    example.train(net, x, y, 0, 12, lambda: None)
    folded, fold = [], example.foldconv.gluon.fold
    monkeypatch.setattr(example.foldconv.gluon, "fold", lambda given: folded.append(fold(given)) or folded[-1])
    assert example.accuracy(net, test_x, test_y) > max(before, 90)
    assert not any(type(layer) is DOConv2D for layer in folded[0])
    assert all(abs(net[index].D.data()).max().asscalar() > 0 for index in (0, 2))
    np.testing.assert_allclose(folded[0](test_x).asnumpy(), net(test_x).asnumpy(), atol=1e-4)


def test_the_table_says_what_the_file_says(example, stripes, tmp_path, capsys):
    out = tmp_path / "results.json"
    report = example.main(["--seeds", "2", "--epochs", "1", "--data", str(stripes), "--out", str(out)])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written == report
    assert (written["images"], written["held_out"], written["seeds"]) == (600, 100, [0, 1])
    assert {"mxnet", "numpy"} < written["versions"].keys()
    printed = capsys.readouterr().out
    for name in ("conv", "doconv"):
        assert len(written["accuracies"][name]) == 2
        assert f"| {name} | {sum(written['accuracies'][name]) / 2:.3f} |" in printed
    assert "paired by seed" in printed


def test_a_file_without_test_images_is_refused_in_one_line(example, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", x_train=np.zeros((2, 28, 28), "u1"), y_train=np.zeros(2, "u1"))
    with pytest.raises(SystemExit):
        example.main(["--data", str(tmp_path / "other.npz")])
    received = capsys.readouterr().err.splitlines()[-1]
    assert "expected arrays x_train, y_train, x_test, y_test, received x_train, y_train" in received
