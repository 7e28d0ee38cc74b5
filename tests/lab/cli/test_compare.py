"""The command: options, the report again, exit codes; and one real comparison, stopped half-way and continued."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from foldconv.lab.compare import runner
from foldconv.lab.compare.cluster import ClusterOptions
from foldconv.lab.train import TrainConfig

PROGRAM = [sys.executable, "-m", "foldconv", "compare"]
SMALL = ["--architecture-args", "width=4", "--epochs", "1", "--batch-size", "256", "--accelerator", "cpu"]


@pytest.fixture
def asked(monkeypatch):
    """The configs and settings that reach `compare`, which does nothing."""
    calls = []
    monkeypatch.setattr(runner, "compare", lambda *given, cluster: calls.append((*given, cluster)) or 1 / 0)
    return calls


def test_options_reach_the_config(call, asked, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 3\nlr: 0.2\nmethod: acnet\nseed: 5\n")
    arguments = ["--methods", "doconv, plain", "--seeds", 4, "--config", file, "--lr", 0.05, "--jobs", 2]
    call("compare", *arguments, "--out", tmp_path / "out")
    ((config, out, jobs, cluster),) = asked
    assert (config.methods, config.seeds, out, jobs) == (("doconv", "plain"), 4, str(tmp_path / "out"), 2)
    assert cluster is None
    assert (config.train.epochs, config.train.lr, config.train.seed) == (3, 0.05, 5)
    assert [job.seed for job in config.jobs("")][::2] == [5, 6, 7, 8]


def test_defaults(call, asked):
    call("compare", "--out", "out", "--architecture-args", "width=4")
    ((config, _, jobs, _),) = asked
    assert (config.methods, config.seeds, jobs) == (("plain", "doconv"), 10, 1)
    assert config.train == TrainConfig(architecture_args={"width": 4})


def test_a_cluster(call, asked):
    call("compare", "--out", "out", "--ray")
    call("compare", "--out", "out", "--ray", "head:6379", "--cpus-per-run", 4, "--gpus-per-run", 0.25)
    assert [given[-1] for given in asked] == [ClusterOptions(), ClusterOptions("head:6379", 4, 0.25)]


@pytest.mark.parametrize(
    ("given", "methods"),
    [
        ([], ("plain", "expandnet:rate=2:chain=CK")),
        (["--methods", "plain,expandnet,doconv"], ("plain", "expandnet:rate=2:chain=CK", "doconv")),
        (["--methods", "plain,expandnet:rate=3"], ("plain", "expandnet:rate=3")),
    ],
)
def test_a_recipes_method_options_go_to_its_method(given, methods, call, asked, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: expandnet\nmethod_args: {rate: 2, chain: CK}\nlr: 0.02\n")
    call("compare", "--out", str(tmp_path / "out"), "--config", str(recipe), *given)
    config, *_ = asked[0]
    assert (config.methods, config.train.method_args, config.train.lr) == (methods, {}, 0.02)


def test_every_shared_option_of_train_is_there(call):
    _, train, _ = call("train", "--help")
    _, compare, _ = call("compare", "--help")

    def options(text):
        return {word.strip("[],") for word in text.split() if word.startswith(("--", "[--"))}

    alone = {"--resume", "--method", "--method-args", "--baseline", "--no-baseline"}
    assert options(train) - options(compare) == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out FOLDER"),
        (["reprot", "x"], "foldconv compare: unknown argument 'reprot'; did you mean 'report'?"),
        (["report"], "foldconv compare report: the following arguments are required: FOLDER"),
        (["report", "x", "--epochs", "3"], "foldconv compare report: unknown argument '--epochs'"),
        (["report", "x", "--out", "y"], "foldconv compare report: unknown argument '--out'"),
        (["--jobs", "0"], "expected a number ≥ 1, received '0'"),
        (["--jobs", "auto"], "expected a number ≥ 1, received 'auto'"),
        (["--out", "x", "--gpus-per-run", "1"], "--gpus-per-run: with --ray only"),
        (["--out", "x", "--ray", "--jobs", "2"], "--jobs: not with --ray"),
        (["--ray", "--gpus-per-run", "half"], "expected a number, received 'half'"),
        (["--method", "doconv"], "unknown argument '--method'; did you mean '--methods'?"),
    ],
)
def test_wrong_usage(arguments, message, fails):
    assert message in fails("compare", *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "plain,docon"], "unknown method 'docon'; did you mean 'doconv'?"),
        (["--methods", "plain,plain"], "methods: expected one or more, each once"),
        (["--epochs", "0"], "epochs: expected a number ≥ 1"),
        (["--ray", "--gpus-per-run", "1.5"], "--gpus-per-run: expected a share from 0 to 1 or a whole number"),
        (["--ray", "--gpus-per-run", "nan"], "--gpus-per-run: expected a share"),
        (["--ray"], "--ray: this needs Ray (import of ray halted; None in sys.modules); install it: pip install "),
    ],
)
def test_bad_input_is_one_line(arguments, message, fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    assert message in fails("compare", *arguments, "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_report_needs_a_comparison(fails, tmp_path):
    assert "not the folder of a comparison: it has no compare.yaml" in fails("compare", "report", tmp_path)


def test_failed_runs_are_told_after_the_report(call, monkeypatch):
    values = {"title": "T", "runs_finished": 1, "runs_total": 2, "runs_at_once": 1, "baseline": "plain"}
    values["methods"] = {
        "plain": {"accuracies": {"0": 90.0}, "mean": 90.0, "std": None, "difference": None}
        | dict.fromkeys(("training_seconds", "peak_memory"))
    }
    failures = {"doconv/seed-0": "exit code 1: the weights diverged"}
    monkeypatch.setattr(runner, "compare", lambda *_, **__: (values, failures))
    code, out, err = call("compare", "--out", "x")
    assert code == 1
    assert "T (1 of 2 runs)" in out
    message = "1 runs failed (doconv/seed-0: exit code 1: the weights diverged); the same command tries them again"
    assert err == f"foldconv: error: {message}\n"
    code, out, _ = call("compare", "--out", "x", "--json")
    assert (code, json.loads(out)) == (1, values)


@pytest.mark.skipif(os.name == "nt", reason="sends a Unix signal")
def test_a_comparison_is_stopped_half_way_and_continued(tmp_path, call_json):
    """2 methods × 2 seeds of real training; what was done before the stop is not done again."""
    command = [*PROGRAM, "--methods", "plain,doconv", "--seeds", "2", *SMALL, "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    first = tmp_path / "out" / "plain" / "seed-0" / "result.json"
    try:
        deadline = time.monotonic() + 180
        while not ((tmp_path / "out" / "doconv" / "seed-0.log").exists() and first.exists()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    last = "foldconv: stopped with 3 of 4 runs to go; continue with the same command"
    assert err.splitlines()[-1] == last
    assert err.startswith("plain, seed 0: ")
    made = first.stat().st_mtime_ns

    done = subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert first.stat().st_mtime_ns == made
    assert done.stderr.splitlines()[0].endswith("of 4 runs are done already")
    assert (values["runs_finished"], list(values["methods"])) == (4, ["plain", "doconv"])
    for name, method in values["methods"].items():
        assert all(accuracy > 5 for accuracy in method["accuracies"].values()), name
        assert method["parameters_folded"] == values["methods"]["plain"]["parameters_folded"]
        assert method["training_seconds"]["ratio"] > 0
    assert values["methods"]["doconv"]["parameters_training"] > values["methods"]["plain"]["parameters_training"]
    assert values["methods"]["doconv"]["difference"]["pairs"] == 2
    assert call_json("compare", "report", tmp_path / "out")["methods"] == values["methods"]
