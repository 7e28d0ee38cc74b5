"""What a run logs besides its table: for TensorBoard, and of its branches."""

import csv
import os

import pytest

from foldconv.errors import UnsupportedError
from foldconv.lab.train import fit, records


def test_missing_package_is_named_before_anything_is_written(tiny, silent, tmp_path, monkeypatch):
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r'needs the package tensorboard; .* "foldconv\[tensorboard\]"'):
        fit(tiny(tensorboard=True, out=str(tmp_path / "run")), silent)
    assert os.listdir(tmp_path) == []


def test_event_files_are_written(tiny, silent, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tiny(tensorboard=True, out=str(tmp_path / "run")), silent)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        logged = [event.value for event in events.Scalars(name)]
        assert logged == pytest.approx([float(row[name]) for row in rows], rel=1e-4), name


def test_branches_are_written_per_epoch(tiny, silent, tmp_path):
    fit(tiny(track_branches=True, method="dbb", out=str(tmp_path / "run")), silent)
    lines = (tmp_path / "run" / "branches.csv").read_text().splitlines()
    epochs = {line.split(",")[0] for line in lines[1:]}
    assert epochs == {"0", "1", "2"}
