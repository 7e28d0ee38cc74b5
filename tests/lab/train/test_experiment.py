"""A run from start to end, cut off and continued, or wrong from the start."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

import foldconv
from foldconv.errors import CheckpointError, NoMatchError, UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.train import TrainConfig, create_data, evaluate, experiment, fit, open_network, resume
from foldconv.lab.train.classifier import Classifier
from foldconv.lab.train.divergence import DivergedError
from foldconv.lab.train.loop import Training
from foldconv.lab.train.optimizers import training_groups


def read_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


# ---------------------------------------------------------------------- what a run leaves


def test_run_folder_is_complete(finished):
    folder, result = finished
    assert sorted(os.listdir(folder)) == [
        ".lock",
        "best.ckpt",
        "config.yaml",
        "curves.png",
        "folded.safetensors",
        "last.ckpt",
        "metrics.csv",
        "previous.ckpt",
        "result.json",
    ]
    assert json.loads((folder / "result.json").read_text())["accuracy_folded"] == result.accuracy_folded
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["epochs"] == 2
    assert config["lr"] == TrainConfig().lr  # resolved: defaults are written, too


def test_metrics_have_a_row_per_epoch(finished):
    rows = read_rows(finished[0])
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[1]["test_accuracy"]) == pytest.approx(finished[1].accuracy_expanded, abs=1e-5)


def test_result_agrees_with_the_files(finished):
    folder, result = finished
    rich, _ = open_network(folder / "last.ckpt")
    plain, _ = open_network(folder / "folded.safetensors")
    data = create_data("digits")
    assert evaluate(rich, data)["accuracy"] == result.accuracy_expanded == result.accuracy_folded
    assert evaluate(plain, data)["accuracy"] == result.accuracy_folded
    assert foldconv.summary(rich, (1, 1, 8, 8)).macs_training == result.macs_training > result.macs_folded
    assert sum(p.numel() for p in rich.parameters()) == result.parameters_training
    assert sum(p.numel() for p in plain.parameters()) == result.parameters_folded < result.parameters_training
    assert 0 < result.max_output_difference < 1e-4  # zero would mean that nothing was folded


def test_training_moved_what_the_method_added(finished):
    rich, _ = open_network(finished[0] / "last.ckpt")
    assert rich.blocks[0].conv1.D.abs().max() > 1e-4


def test_folded_weights_load_into_the_plain_architecture(finished):
    from safetensors.torch import load_file

    zoo.create("digits_resnet", width=4).load_state_dict(load_file(finished[0] / "folded.safetensors"))


def test_plain_method_expands_nothing(tiny, silent, tmp_path):
    result = fit(tiny(method="plain", epochs=1, out=str(tmp_path / "run")), silent)
    assert result.parameters_training == result.parameters_folded
    assert result.max_output_difference == 0


def test_same_seed_same_weights(tiny, silent, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fit(tiny(epochs=1, seed=seed, out=str(tmp_path / name)), silent)
    a, b, c = (state(tmp_path / name)["state_dict"]["network.head.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_progress_is_a_line_per_epoch_and_nothing_else(tiny, silent, tmp_path, capfd):
    fit(tiny(out=str(tmp_path / "run")), silent)
    lines = silent.file.getvalue().splitlines()
    assert lines[0] == f"run folder: {tmp_path / 'run'}"
    assert [line.split()[:2] for line in lines[1:]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert all("test accuracy" in line and "6/6" in line for line in lines[1:])
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------- folders


def test_default_folders_are_numbered(tiny, silent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(architecture="digits_resnet", method="plain", epochs=1)
    names = [fit(config, silent).run for _ in range(3)]
    base = os.path.join("runs", "digits-digits_resnet-plain")
    assert names == [base, f"{base}-2", f"{base}-3"]


def test_a_run_folder_that_cannot_be_made(tiny, silent, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"run folder .*file.run cannot be made \(Not a directory\); choose another"):
        fit(tiny(out=str(tmp_path / "file" / "run")), silent)


def test_existing_folder_is_refused_untouched(tiny, silent, tmp_path):
    with pytest.raises(FileExistsError, match=f"run folder {tmp_path} exists and is not overwritten"):
        fit(tiny(out=str(tmp_path)), silent)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": "digts"}, UnsupportedError, "did you mean 'digits'"),
        ({"architecture": "digits_resnt"}, UnsupportedError, "did you mean 'digits_resnet'"),
        ({"method": "docnv"}, UnsupportedError, "unknown method 'docnv'; did you mean 'doconv'"),
        ({"method": "plan"}, UnsupportedError, "did you mean 'plain'"),
        ({"method_args": {"depth": 9}}, UnsupportedError, "unknown option 'depth'"),
        ({"architecture_args": {"widht": 9}}, UnsupportedError, "widht"),
        ({"accelerator": "abacus"}, Exception, "abacus"),
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(tiny, silent, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        fit(tiny(**settings, out=str(tmp_path / "run")), silent)
    assert os.listdir(tmp_path) == []


def test_a_network_without_convolutions(tiny, silent, tmp_path, monkeypatch):
    linear = lambda num_classes, in_channels: nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))  # noqa: E731
    monkeypatch.setitem(zoo._registry._BUILDERS, "linear", linear)
    with pytest.raises(NoMatchError, match="expected convolutions"):
        fit(tiny(architecture="linear", architecture_args={}, out=str(tmp_path / "run")), silent)


def test_diverged_weights_are_never_folded(tiny, silent, tmp_path):
    with pytest.raises(
        DivergedError, match=r"not finite at step 2 \(epoch 1\); the last good checkpoint is .*last\.ckpt"
    ):
        fit(tiny(lr=1e30, out=str(tmp_path / "run")), silent)
    assert state(tmp_path / "run")["global_step"] == 0
    assert not (tmp_path / "run" / "folded.safetensors").exists()


# ---------------------------------------------------------------------- cut off and continued


class Dropping(nn.Module):
    """Draws at random in its forward: continuing exactly takes more than weights and optimizer."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(72, num_classes)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_resumed_run_equals_an_undisturbed_one(tiny, silent, tmp_path, monkeypatch, schedule):
    monkeypatch.setitem(zoo._registry._BUILDERS, "dropping", Dropping)
    config = {"architecture": "dropping", "architecture_args": {}, "epochs": 4, "schedule": schedule}
    whole = tmp_path / "whole"
    fit(tiny(**config, out=str(whole)), silent)
    original = Training._batch
    for step in (2, 6, 15):  # in the first epoch, right after it, in the third; 6 steps per epoch
        broken = tmp_path / f"broken{step}"

        def interrupted(self, images, labels, index, step=step):
            if self.step == step:
                raise KeyboardInterrupt
            return original(self, images, labels, index)

        with monkeypatch.context() as context:
            context.setattr(Training, "_batch", interrupted)
            handler = signal.getsignal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt, match=f"foldconv train --resume {broken}"):
                fit(tiny(**config, out=str(broken)), silent)
            assert signal.getsignal(signal.SIGINT) is handler
        assert state(broken)["global_step"] == step // 6 * 6
        assert not (broken / "folded.safetensors").exists()

        torch.manual_seed(12345)  # whatever the new process starts with
        resume(broken, silent)
        expected, received = state(whole), state(broken)
        assert received["global_step"] == expected["global_step"] == 24
        for key, value in expected["state_dict"].items():
            assert torch.equal(received["state_dict"][key], value), key
        assert (broken / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_every_epoch_has_its_own_order(tiny, silent, tmp_path, monkeypatch):
    seen, original = [], Training._batch

    def watched(self, images, labels, index):
        seen.append((images.sum(), index))
        return original(self, images, labels, index)

    monkeypatch.setattr(Training, "_batch", watched)
    fit(tiny(epochs=3, out=str(tmp_path / "run")), silent)
    first = [float(total) for total, index in seen if index == 0]
    assert len(set(first)) == 3


def test_finished_run_resumes_to_the_same_result(finished, silent):
    folder, result = finished
    again = resume(folder, silent)
    assert again.accuracy_folded == result.accuracy_folded
    assert len(read_rows(folder)) == 2


@pytest.mark.parametrize("missing", ["last.ckpt", "config.yaml"])
def test_resume_names_what_is_missing(tmp_path, silent, missing):
    for name in {"last.ckpt", "config.yaml"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"cannot resume here: it has no {missing}"):
        resume(tmp_path, silent)


def test_resume_refuses_a_damaged_checkpoint(finished, silent, tmp_path):
    (tmp_path / "config.yaml").write_bytes((finished[0] / "config.yaml").read_bytes())
    (tmp_path / "last.ckpt").write_bytes((finished[0] / "last.ckpt").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        resume(tmp_path, silent)
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.yaml", "last.ckpt"]  # an old run is never cleaned away


def test_resume_removes_what_killed_processes_were_writing(finished, silent, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for name in (".tmp-0123456789ab.ckpt", ".tmp-previous.ckpt"):
        (folder / name).write_bytes(b"half")
    resume(folder, silent)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(finished[0]))


def test_a_run_is_continued_by_one_process(finished, silent):
    """The lock is another process' here; it dies with it."""
    program = """
import pathlib, sys
from foldconv.lab.run import locked

with locked(pathlib.Path(sys.argv[1])):
    print(flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", program, finished[0]], **pipes)
    try:
        other.stdout.readline()
        before = {name: (finished[0] / name).read_bytes() for name in os.listdir(finished[0])}
        with pytest.raises(UnsupportedError, match=f"{finished[0]}: another process trains here"):
            resume(finished[0], silent)
        assert {name: (finished[0] / name).read_bytes() for name in os.listdir(finished[0])} == before
    finally:
        other.kill()
        other.communicate()
    resume(finished[0], silent)


def test_full_disk_keeps_the_checkpoint_before(tiny, silent, tmp_path, monkeypatch):
    """The third writing fails: the second's file stays, and the run resumes from it."""
    save, count = torch.save, iter(range(9))

    def full(content, file):
        save(content, file)
        if next(count) == 2:
            file.truncate(1000)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"the disk is full; free some space and repeat: '.*last\.ckpt'"):
            fit(tiny(out=str(tmp_path / "run")), silent)
    assert state(tmp_path / "run")["global_step"] == 6
    assert not any(name.startswith(".tmp") for name in os.listdir(tmp_path / "run"))
    assert resume(tmp_path / "run", silent).epochs == 2


# ---------------------------------------------------------------------- the training step


def make_classifier(config=None, expanded=True):
    network = zoo.create("digits_resnet", width=4)
    network = foldconv.expand(network, "doconv") if expanded else network
    return Classifier(network, config or TrainConfig(), 10)


def test_loss_contains_the_methods_penalties(monkeypatch):
    module = make_classifier()
    batch = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    before, shown, _ = module(*batch)
    monkeypatch.setattr("foldconv.lab.train.classifier.regularization", lambda network: torch.tensor(5.0))
    minimized, loss, right = module(*batch)
    assert (minimized - before).item() == pytest.approx(5.0, abs=1e-5)
    assert loss == shown == before
    assert right == (module.outputs(batch[0]).argmax(1) == batch[1]).sum()


def test_decay_spares_norms_and_biases():
    module = make_classifier()
    groups = training_groups(module.network, 0.25, 0.1)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == len(list(module.network.parameters()))
    assert decays[id(module.network.stem[0].weight)] == 0.25
    assert decays[id(module.network.stem[1].weight)] == 0.0


def test_small_images_train_on_one_thread(tiny, silent, tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(experiment, "_train", lambda *_: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(experiment, "_finish", lambda *_: experiment.TrainResult(*[""] * 13))
    torch.set_num_threads(2)
    try:
        fit(tiny(out=str(tmp_path / "a")), silent)
        fit(tiny(out=str(tmp_path / "b"), threads=2), silent)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]
