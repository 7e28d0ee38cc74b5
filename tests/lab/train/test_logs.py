"""What a run logs besides its table: by Lightning's loggers, and of its branches."""

import csv
import json
import os
import re

import pytest

from foldconv.errors import UnsupportedError
from foldconv.errors import install as install_extra
from foldconv.lab.train import TrainConfig, fit, loggers, records, resume


def test_missing_package_is_named_before_anything_is_written(tiny, silent, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for name, install in (
        ("tensorboard", re.escape(install_extra("tensorboard"))),
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
    ):
        with pytest.raises(UnsupportedError, match=rf"logger: {name} needs the package {name}; .* {install}$"):
            fit(tiny(logger=name, out=str(tmp_path / "run")), silent)
    assert os.listdir(tmp_path) == []


def test_runs_of_earlier_versions_name_tensorboard():
    assert TrainConfig.from_dict({"tensorboard": True}).logger == "tensorboard"
    assert TrainConfig.from_dict({"tensorboard": False}) == TrainConfig()


def logged(folder, logger):
    """What the logger of a run wrote: each metric's values by step."""
    if logger == "csv":
        with open(folder / "csv" / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: {int(row["step"]): float(row[name]) for row in rows} for name in NAMES}
    if logger == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return {name: {event.step: event.value for event in events.Scalars(name)} for name in NAMES}
    from mlflow import MlflowClient

    client, identity = (
        MlflowClient(f"sqlite:///{folder}/mlflow.db"),
        json.loads((folder / "logger.json").read_text())["id"],
    )
    assert client.get_run(identity).data.params["epochs"] == "2"
    return {name: {m.step: m.value for m in client.get_metric_history(identity, name)} for name in NAMES}


NAMES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


@pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy")  # mlflow's, with SQLAlchemy 2.1
@pytest.mark.parametrize("logger", ["csv", "tensorboard", "mlflow"])
def test_a_resumed_run_goes_on_in_its_log(logger, tiny, silent, tmp_path, monkeypatch):
    if logger != "csv":
        pytest.importorskip(logger, reason=f"{logger}: with nox -s hosts" if logger == "mlflow" else None)
    folder = tmp_path / "run"
    written = records.write_checkpoint

    def stop(content, *args):
        written(content, *args)
        if content["epoch"] == 0 and content["global_step"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(records, "write_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(logger=logger, out=str(folder)), silent)
    monkeypatch.undo()
    resume(folder, silent)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for name, values in logged(folder, logger).items():
        assert values == pytest.approx({6: float(rows[0][name]), 12: float(rows[1][name])}, rel=1e-4), name


def test_wandb(tiny, silent, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb: with nox -s hosts")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(tiny(logger="wandb", out=str(tmp_path / "run")), silent)
    (found,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert found.name.endswith(json.loads((tmp_path / "run" / "logger.json").read_text())["id"])


def test_branches_are_written_per_epoch(tiny, silent, tmp_path):
    fit(tiny(track_branches=True, method="dbb", out=str(tmp_path / "run")), silent)
    lines = (tmp_path / "run" / "branches.csv").read_text().splitlines()
    epochs = {line.split(",")[0] for line in lines[1:]}
    assert epochs == {"0", "1", "2"}
