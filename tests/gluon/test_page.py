"""The page's example for Gluon runs, and does what its comments say."""

import numpy as np


def test_the_example_runs(page_example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(page_example("gluon.expand"), names)
    assert "DOConv2D" in repr(names["rich"])
    assert "DOConv2D" not in repr(names["net"])
    rich, net = (names[name](names["x"]).asnumpy() for name in ("rich", "net"))
    np.testing.assert_allclose(net, rich, atol=1e-5 * abs(rich).max())
