"""What a run keeps and when it ends: the best checkpoint, the second accuracy, an early stop, more epochs."""

import csv
import os

import pytest
import torch

from foldconv.errors import UnsupportedError
from foldconv.lab.cli import main
from foldconv.lab.data import create_data
from foldconv.lab.train import evaluate, fit, open_network, records, resume
from foldconv.lab.train.loop import Training


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(folder, name="last.ckpt"):
    return torch.load(folder / name, weights_only=True)["state_dict"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def reached(monkeypatch):
    """The test accuracies that epochs seem to reach; the network is trained as ever."""
    found = {}

    def pretend(accuracies):
        found.update(enumerate(accuracies, 1))

    true = Training.validate

    def validate(self):
        result = true(self)
        return result | ({"test_accuracy": found[self.epoch]} if self.epoch in found else {})

    monkeypatch.setattr(Training, "validate", validate)
    return pretend


def test_second_accuracy(finished):
    folder, result = finished
    found = evaluate(open_network(folder)[0], create_data("digits"))
    assert found["top5_accuracy"] == result.top5_expanded == result.top5_folded
    assert found["accuracy"] < found["top5_accuracy"] < 1
    assert float(rows_of(folder)[-1]["test_top5_accuracy"]) == pytest.approx(found["top5_accuracy"], rel=1e-5)


def test_five_classes_have_no_second_accuracy(tiny, silent, tmp_path):
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 5
    np.savez(tmp_path / "five.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    result = fit(tiny(data=str(tmp_path / "five.npz"), epochs=1, out=str(tmp_path / "run")), silent)
    assert result.top5_expanded is None
    assert rows_of(tmp_path / "run")[0]["test_top5_accuracy"] == ""


def test_the_best_checkpoint_is_kept_and_a_run_stops_when_nothing_gets_better(
    tiny, silent, tmp_path, reached, monkeypatch
):
    reached([0.2, 0.6, 0.6, 0.5, 0.9])
    config = {"epochs": 6, "schedule": "constant", "lr": 0.01, "patience": 2, "keep": 4}
    result = fit(tiny(**config, out=str(tmp_path / "run")), silent)
    assert (result.epochs, result.best_epoch, result.best_accuracy) == (4, 2, 0.6)
    assert same(weights(tmp_path / "run", "best.ckpt"), weights(tmp_path / "run", "previous-2.ckpt"))
    assert "stopped after epoch 4 of 6: the test accuracy has not risen since epoch 2" in silent.file.getvalue()

    # Cut off in its third epoch: what was kept and when it stopped are the same.
    written = records.write_checkpoint

    def cut(content, *args):
        written(content, *args)
        if content["epoch"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(records, "write_checkpoint", cut)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(**config, out=str(tmp_path / "cut")), silent)
    monkeypatch.setattr(records, "write_checkpoint", written)
    assert not same(weights(tmp_path / "cut", "best.ckpt"), weights(tmp_path / "cut"))  # killed before it was kept
    again = resume(tmp_path / "cut", silent)
    assert (again.epochs, again.best_epoch) == (4, 2)
    for name in ("best.ckpt", "last.ckpt"):
        assert same(weights(tmp_path / "cut", name), weights(tmp_path / "run", name))

    # And a run that was stopped goes on.
    longer = resume(tmp_path / "run", silent, patience=0)
    assert (longer.epochs, longer.best_epoch) == (6, 5)
    assert same(weights(tmp_path / "run", "best.ckpt"), weights(tmp_path / "run", "previous.ckpt"))


def test_no_best_checkpoint(tiny, silent, tmp_path):
    fit(tiny(epochs=1, best=False, out=str(tmp_path / "run")), silent)
    assert "best.ckpt" not in os.listdir(tmp_path / "run")


def test_a_finished_run_is_extended_where_its_schedule_allows_it(tiny, silent, tmp_path, capsys):
    step = {"schedule": "step", "schedule_args": {"milestones": [2], "factor": 0.5}, "warmup_epochs": 1}
    for number, schedule in enumerate(({"schedule": "constant"}, step)):
        long, short = (tmp_path / f"{name}{number}" for name in ("long", "short"))
        fit(tiny(**schedule, epochs=3, out=str(long)), silent)
        fit(tiny(**schedule, epochs=2, out=str(short)), silent)
        assert resume(short, silent, epochs=3).epochs == 3
        assert same(weights(short), weights(long))
        assert [row["lr"] for row in rows_of(short)] == [row["lr"] for row in rows_of(long)]
        assert resume(short, silent).epochs == 3  # config.yaml says so, too
    with pytest.raises(UnsupportedError, match="epochs: expected 3 or more, received 2"):
        resume(short, silent, epochs=2)
    before = (long / "last.ckpt").read_bytes()
    for name, schedule in (("onecycle", "onecycle"), ("cosine", "cosine"), ("halves", "step")):
        fit(tiny(schedule=schedule, epochs=1, out=str(tmp_path / name)), silent)
        assert main(["train", "--resume", str(tmp_path / name), "--epochs", "2"]) == 1
        error = capsys.readouterr().err
        assert f"its schedule ({schedule}) is made for 1, and would have been another one for 2" in error
        assert len(rows_of(tmp_path / name)) == 1
    assert main(["train", "--resume", str(long), "--epochs", "4", "--lr", "1"]) == 2
    assert "so --lr cannot be given" in capsys.readouterr().err
    assert (long / "last.ckpt").read_bytes() == before
