"""The page's example for Keras runs, and does what its comments say."""

import numpy as np

from keras import ops


def test_the_example_runs(page_example):
    names = {}
    exec(page_example("foldconv.keras"), names)
    assert [layer for layer in names["rich"].layers if type(layer).__name__ == "DOConv2D"]
    assert not [layer for layer in names["plain"].layers if type(layer).__name__.startswith("DO")]
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    rich, net = (ops.convert_to_numpy(names[name](x)) for name in ("rich", "net"))
    np.testing.assert_allclose(net, rich, atol=1e-5)
