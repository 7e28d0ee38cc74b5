"""Validation costs what the plain network's costs, and leaves training as it was."""

import pytest

from foldconv.algebra import Sum
from foldconv.lab.train import fit
from foldconv.lab.train.classifier import Classifier
from foldconv.layers import once


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_no_branch_runs_in_validation(tiny, silent, tmp_path, monkeypatch, ema):
    seen, original = [], Sum.forward

    def run(self, input):
        seen.append(self.training)
        return original(self, input)

    monkeypatch.setattr(Sum, "forward", run)
    # Folding, which comes after training, looks at the branches.
    monkeypatch.setattr("foldconv.lab.train.experiment._finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tiny(method="repvgg", epochs=2, ema=ema, out=str(tmp_path / "run")), silent)
    assert seen
    assert all(seen)
    assert not once._open


def test_training_that_ends_in_validation_leaves_nothing_open(tiny, silent, tmp_path, monkeypatch):
    original = Classifier.outputs

    def stop(self, images, network=None):
        if once._open:
            raise ZeroDivisionError
        return original(self, images, network)

    monkeypatch.setattr(Classifier, "outputs", stop)
    with pytest.raises(ZeroDivisionError):
        fit(tiny(method="repvgg", out=str(tmp_path / "run")), silent)
    assert not once._open
