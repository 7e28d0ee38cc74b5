"""Runs in their order, once each, continued where they were cut off, and failures that stop nobody else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from filelock import FileLock

from foldconv.errors import UnsupportedError
from foldconv.lab.compare.config import CompareConfig, Job
from foldconv.lab.compare.results import finished
from foldconv.lab.run import locked


def test_runs_go_seed_by_seed_over_the_methods(fake, run, config):
    calls = fake()
    values, failures, shown = run(config(seeds=2, seed=4))
    assert calls == [("plain", 4, False), ("doconv", 4, False), ("plain", 5, False), ("doconv", 5, False)]
    assert failures == {}
    assert values["methods"]["doconv"]["accuracies"] == {"4": 95.0, "5": 96.0}
    assert shown.splitlines()[0].startswith("plain, seed 4: 94.00 %, ")
    assert shown.splitlines()[-1].endswith("(4/4)")


def test_each_run_gets_its_config(fake, run, config, tmp_path):
    fake()
    run(config("plain,doconv:depth_multiplier=12", seeds=1, lr=0.05, data_folder="elsewhere"))
    folder = tmp_path / "out" / "doconv-depth_multiplier=12"
    saved = yaml.safe_load((folder / "seed-0.yaml").read_text())
    assert (saved["method"], saved["method_args"]["depth_multiplier"]) == ("doconv", 12)
    assert (saved["lr"], saved["data_folder"], saved["seed"]) == (0.05, "elsewhere", 0)
    plain = yaml.safe_load((tmp_path / "out" / "plain" / "seed-0.yaml").read_text())
    assert plain == {**saved, "method": "plain", "method_args": {}}


def test_more_seeds_and_methods_may_come_later(fake, run, config):
    run_before = fake()
    run(config(seeds=1))
    assert len(run_before) == 2
    calls = fake()
    values, _, shown = run(config("plain,doconv,orepa", seeds=2))
    assert calls == [("orepa", 0, False), ("plain", 1, False), ("doconv", 1, False), ("orepa", 1, False)]
    assert "2 of 6 runs are done already" in shown
    assert values["runs_finished"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "epochs (was 2, now 3)"),
        ({"seeds": 1}, "seeds (was 2, now 1)"),
        ({"seed": 1}, "seed (was 0, now 1)"),
        ({"methods": "plain"}, "methods (was plain,doconv, now plain)"),
        ({"methods": "doconv,plain"}, "methods (was plain,doconv, now doconv,plain)"),
    ],
)
def test_other_settings_are_refused_by_name(change, message, fake, run, config):
    fake()
    run(config(seeds=2))
    calls = fake()
    with pytest.raises(UnsupportedError) as error:
        run(config(**{"seeds": 2, **change}))
    assert f"other settings: {message}; choose another --out" in str(error.value)
    assert calls == []


def test_all_changed_keys_are_named(fake, run, config):
    fake()
    run(config(seeds=1))
    with pytest.raises(UnsupportedError, match=r"epochs \(was 2, now 5\); lr \(was 0.1, now 0.2\)"):
        run(config(seeds=1, epochs=5, lr=0.2))


def test_a_folder_with_other_things_is_left_alone(fake, run, config, tmp_path):
    calls = fake()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="is not the folder of a comparison"):
        run(config())
    assert (calls, os.listdir(tmp_path / "out")) == ([], ["thesis.txt"])


@pytest.mark.parametrize("methods", ["plain,docon", "plain,doconv:depth=3"])
def test_unknown_methods_and_options_are_refused_before_any_run(methods, fake, run, config, tmp_path):
    calls = fake()
    with pytest.raises(UnsupportedError, match=r"unknown method 'docon'|unknown option 'depth'"):
        run(config(methods))
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_a_failure_stops_nobody_else_and_is_tried_again(fake, run, config):
    fake("fail")
    values, failures, shown = run(config(seeds=2))
    assert failures == {"doconv/seed-0": "exit code 1: the weights diverged"}
    assert "doconv, seed 0: failed (exit code 1: the weights diverged)" in shown
    assert (values["runs_finished"], values["runs_total"]) == (3, 4)
    assert values["methods"]["doconv"]["difference"] is None  # one pair has no interval
    calls = fake()
    values, failures, _ = run(config(seeds=2))
    assert (calls, failures) == ([("doconv", 0, False)], {})
    assert values["runs_finished"] == 4


def interrupt_when(exists):
    """Ctrl-C for this process as soon as a file is there."""

    def watch():
        deadline = time.monotonic() + 60
        while not exists.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.skipif(os.name == "nt", reason="sends a Unix signal")
def test_ctrl_c_stops_the_runs_and_the_same_call_continues_them(fake, run, config, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        fake("wait")
        interrupt_when(tmp_path / "out" / "plain" / "seed-0" / "last.ckpt")
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt, match="stopped with 4 of 4 runs to go; continue with the same command"):
            run(config(seeds=2))
        assert time.monotonic() - begin < 60
    finally:
        signal.signal(signal.SIGINT, before)
    assert "KeyboardInterrupt" in (tmp_path / "out" / "plain" / "seed-0.log").read_text()  # asked, not killed
    calls = fake()
    values, failures, _ = run(config(seeds=2))
    assert (calls[:2], failures) == ([("plain", 0, True), ("doconv", 0, False)], {})
    assert (tmp_path / "out" / "plain" / "seed-0" / "last.ckpt").read_text() == "continued"
    assert values["runs_continued"] == 1
    assert values["methods"]["plain"]["training_seconds"]["runs"] == 1  # of a run in two parts the time is unknown


def test_a_run_killed_before_its_first_checkpoint_starts_anew(fake, run, config, tmp_path):
    folder = tmp_path / "out" / "plain" / "seed-0"
    fake()
    run(config(seeds=1))
    for name in ("last.ckpt", "result.json"):
        (folder / name).unlink()
    calls = fake()
    values, failures, _ = run(config(seeds=1))
    assert (calls, failures) == ([("plain", 0, False)], {})
    assert (values["runs_finished"], values["runs_continued"]) == (2, 0)


def test_two_at_once_in_one_folder_are_refused(fake, run, config, tmp_path):
    calls = fake()
    (tmp_path / "out").mkdir()
    config().save(tmp_path / "out")
    with locked(tmp_path / "out"):
        with pytest.raises(UnsupportedError, match="another process trains here"):
            run(config())
    assert calls == []
    run(config())


KILLED = """
import os, pathlib, sys
from foldconv.lab.compare import processes
from foldconv.lab.compare.config import CompareConfig, Job
from foldconv.lab.run import locked

root = pathlib.Path(sys.argv[1])
processes._command = lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"]
with locked(root) as locks:
    print(processes.start_process(CompareConfig(), Job("plain", 0, root), 1, locks).process.pid, flush=True)
    os._exit(9)  # releases nothing by itself
"""


@pytest.mark.skipif(os.name == "nt", reason="runs of Windows inherit no files")
def test_a_run_that_outlives_us_keeps_the_folder(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    orphan = int(done.stdout)
    try:
        with pytest.raises(UnsupportedError, match="another process"), locked(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)
    with FileLock(tmp_path / ".lock", timeout=30):  # it is gone
        pass


def test_several_at_once_are_noted(fake, run, config, tmp_path):
    calls = fake()
    values, failures, _ = run(config(seeds=3), jobs=4)
    assert (len(calls), failures, values["runs_at_once"]) == (6, {}, 4)
    assert "Up to 4 runs were made at once" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ()}, "methods: expected one or more"),
        ({"methods": ("plain", "plain")}, "each once, received 'plain,plain'"),
        ({"methods": ("plain", "")}, "methods: expected one or more"),
        ({"seeds": 0}, "seeds: expected a number ≥ 1, received 0"),
    ],
)
def test_impossible_comparisons(settings, message):
    with pytest.raises(UnsupportedError, match=message):
        CompareConfig(**settings)


def test_options_of_one_method_do_not_go_to_all(config):
    with pytest.raises(UnsupportedError, match="would go to every method"):
        config(method_args={"depth_multiplier": 12})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: 3", "expected format 'foldconv-compare-1', received None"),
        ("[", "not a YAML file"),
        (None, "it has no"),
    ],
)
def test_a_damaged_comparison_is_named(text, message, tmp_path):
    if text is not None:
        (tmp_path / "compare.yaml").write_text(text)
    with pytest.raises(UnsupportedError, match=message):
        CompareConfig.load(tmp_path)


def test_a_damaged_result_is_a_run_that_is_missing(fake, run, config, tmp_path):
    fake()
    run(config(seeds=2))
    path = tmp_path / "out" / "plain" / "seed-1" / "result.json"
    for text in ("{", "[]", json.dumps({"accuracy_folded": None})):
        path.write_text(text)
        calls = fake()
        values, _, _ = run(config(seeds=2))
        assert values["runs_finished"] == 4
        assert calls == [("plain", 1, True)]
    assert finished(Job("plain", 1, tmp_path / "out"))
