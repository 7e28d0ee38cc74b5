"""The plain network beside a run: the same as one trained alone, continued exactly, and no more than was asked for."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file

from foldconv.errors import UnsupportedError
from foldconv.lab import cli
from foldconv.lab.compare import runner
from foldconv.lab.train import TrainConfig, experiment
from foldconv.lab.train.records import Records

SMALL = ["--architecture-args", "width=4", "--epochs", "2", "--batch-size", "512", "--accelerator", "cpu"]
SMALL += ["--track-branches", "--include", "*conv*"]  # which a plain network has no use for


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folded weights of the plain network, trained alone."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert cli.main(["train", *SMALL[:8], "--method", "plain", "--out", str(out), "--json"]) == 0
    assert not (out / "baseline").exists()
    return load_file(out / "folded.safetensors")


def assert_is(folder, weights):
    found = load_file(folder / "folded.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_it_is_the_plain_network_of_the_same_seed(weights, call, monkeypatch, tmp_path):
    run = tmp_path / "a run"
    code, out, err = call("train", *SMALL, "--method-args", "depth_multiplier=12", "--out", run)
    assert code == 0, err
    assert_is(run / "baseline", weights)
    rich, plain = (json.loads((path / "result.json").read_text()) for path in (run, run / "baseline"))
    table = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in out.splitlines()}
    assert table["digits_resnet on digits"] == "plain"
    assert table["test accuracy"] == f"{100 * plain['accuracy_folded']:.2f} %"
    assert table["parameters"] == f"{plain['parameters_folded']:,}"
    gain = 100 * (rich["accuracy_folded"] - plain["accuracy_folded"])
    assert f"doconv, folded, against plain: {gain:+.2f} points with seed 0. One seed proves nothing" in out
    asked = []
    monkeypatch.setattr(runner, "compare", lambda config, *_, **__: asked.append(config) or 1 / 0)
    call(*shlex.split(out.splitlines()[-1])[1:])  # the command that would tell
    assert asked[0].methods == ("plain", "doconv:depth_multiplier=12")
    assert (asked[0].seeds, asked[0].train.epochs, asked[0].train.include) == (10, 2, ["*conv*"])
    assert not any(asked[0].job_config(job).baseline for job in asked[0].jobs(tmp_path))


def test_it_goes_on_where_it_was_stopped(weights, call, call_json, monkeypatch, tmp_path):
    run, epoch, seen = tmp_path / "run", Records.epoch, []

    def stop_at_the_fourth(self):
        seen.append(self)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return epoch(self)

    monkeypatch.setattr(Records, "epoch", stop_at_the_fourth)
    code, out, err = call("train", *SMALL, "--out", run)
    assert (code, out) == (130, "")
    remedy = f"continue with: foldconv train --resume {run}"
    assert err.splitlines()[-1] == f"foldconv: stopped while the plain network trained; {remedy}"
    assert not (run / "baseline" / "result.json").exists()
    result = call_json("train", "--resume", run)
    assert len(seen) == 5  # the run itself was finished
    assert result["baseline"]["run"] == str(run / "baseline")
    assert_is(run / "baseline", weights)
    for file in (run / "baseline").glob("*.ckpt"):
        file.unlink()  # as after a kill before the first one
    monkeypatch.setattr(experiment, "fit", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in call("train", "--resume", run)[2]
    assert not (run / "baseline").exists()


def test_who_leaves_it_out_gets_none(call_json, tmp_path):
    (tmp_path / "none.yaml").write_text("baseline: false\n")
    for name, option in (("option", ["--no-baseline"]), ("file", ["--config", tmp_path / "none.yaml"])):
        result = call_json("train", *SMALL[:2], "--epochs", 1, "--batch-size", 512, "--out", tmp_path / name, *option)
        assert result["baseline"] is None
        assert not (tmp_path / name / "baseline").exists()
        assert TrainConfig.load(tmp_path / name / "config.yaml").baseline is False


def test_one_that_fails_takes_nothing_from_the_run(call, monkeypatch, tmp_path):
    fit = experiment.fit

    def no_plain(config, console):
        if config.method == "plain":
            raise UnsupportedError("no plain network here")
        return fit(config, console)

    monkeypatch.setattr(experiment, "fit", no_plain)
    code, out, _ = call("train", *SMALL, "--out", tmp_path / "run")
    assert code == 0
    assert "test accuracy" in out
    assert out.endswith("plain network: not trained: no plain network here\n")


def test_several_processes_have_none(fails, tmp_path):
    assert "baseline: is not trained by several processes" in fails(
        "train", "--devices", 2, "--baseline", "--out", tmp_path / "run"
    )
