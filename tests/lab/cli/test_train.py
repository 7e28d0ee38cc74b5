"""The main job, and its continuation."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from foldconv.lab import recipes

SMALL = ["--architecture-args", "width=4", "--epochs", "1", "--batch-size", "256", "--accelerator", "cpu"]
ALONE = [*SMALL, "--no-baseline"]
PROGRAM = [sys.executable, "-m", "foldconv"]


def test_the_main_job(tmp_path):
    """`foldconv train` without options: clean streams, nothing lost by folding, the plain network beside it."""
    done = subprocess.run([*PROGRAM, "train", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["accuracy_folded"] == result["accuracy_expanded"] >= 0.975
    assert 0 < result["max_output_difference"] < 1e-4
    assert result["parameters_folded"] < result["parameters_training"]
    assert result["macs_folded"] < result["macs_training"]
    assert result["run"] == os.path.join("runs", "digits-digits_resnet-doconv")
    lines = done.stderr.splitlines()
    assert lines[0] == f"run folder: {result['run']}"
    assert result["baseline"]["method"] == "plain"
    assert result["baseline"]["accuracy_folded"] >= 0.97
    middle = 1 + result["epochs"]
    assert lines[middle].startswith("the plain network under the same seed")
    assert lines[middle + 1] == f"run folder: {os.path.join(result['run'], 'baseline')}"
    epochs = lines[1:middle] + lines[middle + 2 :]
    assert len(epochs) == 2 * result["epochs"]  # not one line of anybody's warnings or advertisements
    assert all(line.startswith("epoch ") for line in epochs)


def test_table_shows_both_networks(call, tmp_path):
    code, out, err = call("train", *ALONE, "--out", tmp_path / "run")
    assert code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = {line.split("  ")[0]: line.split()[-2:] for line in out.splitlines() if "  " in line}
    assert rows["parameters"] == [f"{result['parameters_training']:,}", f"{result['parameters_folded']:,}"]
    assert rows["multiply-adds of one image"] == [f"{result['macs_training']:,}", f"{result['macs_folded']:,}"]
    assert out.count(f"{100 * result['accuracy_folded']:.2f} %") == 2
    assert f"{result['max_output_difference']:.1e}" in out
    assert str(tmp_path / "run") in out
    assert err.count("\n") == 2


def test_the_line_overrides_the_file(call_json, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "epochs: 3\nseed: 5\nbatch_size: 256\naccelerator: cpu\narchitecture_args: {width: 6}\nbaseline: false\n"
    )
    result = call_json(
        "train", "--config", file, "--epochs", 1, "--method-args", "depth_multiplier=12", "--out", tmp_path / "run"
    )
    assert result["epochs"] == 1
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["epochs"], saved["seed"], saved["architecture_args"]) == (1, 5, {"width": 6})
    assert saved["method_args"] == {"depth_multiplier": 12}


def test_existing_folder(fails, tmp_path):
    assert f"the run folder {tmp_path} exists and is not overwritten" in fails("train", "--out", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "docon"], "unknown method 'docon'; did you mean 'doconv'?"),
        (["--architecture", "resnet_18"], "unknown architecture 'resnet_18'"),
        (["--data", "digts"], "did you mean 'digits'?"),
        (["--epochs", "0"], "epochs: expected a number ≥ 1, received 0"),
        (["--config", "nowhere.yaml"], "config: no file and unknown recipe 'nowhere.yaml'; "),
        (["--resume", "nowhere"], "nowhere: cannot resume here: it has no config.yaml"),
        (
            ["--method-args", "depth_multiplyer=9"],
            "unknown option 'depth_multiplyer'; did you mean 'depth_multiplier'?",
        ),
        (["--method-args", "method=orepa"], "method_args: expected options of the method, received 'method'"),
        (["--architecture-args", "widht=9"], "'digits_resnet': unknown option 'widht'; did you mean 'width'?"),
        (
            ["--optimizer-args", "nesterof=true"],
            "(given: nesterof): unknown option 'nesterof'; did you mean 'nesterov'?",
        ),
        (["--optimizer-args", "x=1"], "unknown option 'x'; expected one of: dampening, nesterov, "),
        (["--optimizer", "adamw", "--optimizer-args", "beta=1"], "unknown option 'beta'; did you mean 'betas'?"),
        (["--optimizer", "lamb", "--optimizer-args", "trustclip=1"], "did you mean 'trust_clip'?"),
        (["--schedule-args", "pct=.5"], "'onecycle': unknown option 'pct'; did you mean 'pct_start'?"),
        (
            ["--schedule-args", "total_steps=5"],
            "'onecycle': unknown option 'total_steps'; expected one of: pct_start, ",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails("train", *arguments)
    assert os.listdir(tmp_path) in ([], ["runs"])  # and no run folder is left
    assert not os.path.exists("runs") or os.listdir("runs") == []


@pytest.mark.parametrize("wrong", [["--architecture", "resnet_18"], ["--method", "docon"]])
def test_names_are_looked_up_before_data_are(fails, tmp_path, wrong):
    message = fails("train", *wrong, "--data", "cifar10", "--no-download", "--data-folder", tmp_path / "none")
    assert f"unknown {wrong[0][2:]} {wrong[1]!r}; did you mean" in message


def test_unknown_key_in_the_file(fails, tmp_path):
    (tmp_path / "c.yaml").write_text("epoch: 3")
    assert "unknown config key 'epoch'; did you mean 'epochs'?" in fails("train", "--config", tmp_path / "c.yaml")


@pytest.mark.parametrize("other", [["--lr", "9"], ["--config", "c.yaml"]])
def test_resume_takes_no_other_settings(fails, other):
    assert f"so {other[0]} cannot be given" in fails("train", "--resume", "run", *other, code=2)


def test_resume_of_a_finished_run(call_json, run_folder):
    before = json.loads((run_folder / "result.json").read_text())
    assert call_json("train", "--resume", run_folder)["accuracy_folded"] == before["accuracy_folded"]


@pytest.mark.skipif(os.name == "nt", reason="sends a Unix signal")
def test_ctrl_c_leaves_a_run_to_resume(tmp_path, call_json):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            *PROGRAM,
            "train",
            "--architecture-args",
            "width=4",
            "--epochs",
            "4000",
            "--accelerator",
            "cpu",
            "--no-baseline",
            "--out",
            str(run),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.csv").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == f"foldconv: stopped; continue with: foldconv train --resume {run}"
    assert "Traceback" not in err
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "epochs": 1}))  # the rest would take hours
    assert call_json("train", "--resume", run)["accuracy_folded"] > 0.1


def test_the_list_of_recipes(call, call_json):
    code, out, err = call("train", "--config", "list")
    assert (code, err) == (0, "")
    assert out.splitlines() == recipes.names() == call_json("train", "--config", "list")["recipes"]


def test_the_nearest_recipe_is_named(fails):
    for command in (("train",), ("compare", "--out", "none")):
        error = fails(*command, "--config", "gluoncv/resnet50v1b")
        assert "did you mean 'gluoncv/resnet50_v1b'?" in error
        assert error.endswith("(foldconv train --config list shows all)")
