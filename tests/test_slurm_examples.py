"""The scripts for Slurm, run by bash with stand-ins for Slurm and Ray: what they start is what our commands take."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from foldconv.lab import recipes
from foldconv.lab.cli import parse

EXAMPLES = Path(__file__).parents[1] / "examples"
STAND_IN = """#!/bin/bash
printf '%s\\n' "$(basename "$0")" "$@" > "$CALLS/$$" # a file for each: several run side by side
"""
SLURM = {"SLURM_NNODES": "4", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "n[1-4]"}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="for bash")


@pytest.fixture
def started(tmp_path):
    """``started(script, **environment)``: the commands that it starts, as lists of words."""
    for name in ("srun", "foldconv"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    for name, body in {"scontrol": "printf 'n1\\nn2\\nn3\\nn4\\n'", "sleep": ":"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(script, **environment):
        calls = Path(tempfile.mkdtemp(dir=tmp_path))
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {**os.environ, **SLURM, "PATH": path, "CALLS": str(calls), **environment}
        done = subprocess.run(["bash", str(EXAMPLES / script)], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return [call.read_text().splitlines() for call in calls.iterdir()]

    return run


def test_training(started, tmp_path):
    (words,) = started("slurm_train.sh", RUN=str(tmp_path / "run"))
    assert words[:2] == ["srun", "foldconv"]
    options = parse(words[2:])
    assert (options.nodes, options.devices, options.strategy, options.out) == (4, 2, "ddp", str(tmp_path / "run"))
    assert recipes.find(options.config).is_file()

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").touch()
    (words,) = started("slurm_train.sh", RUN=str(tmp_path / "run"))
    assert parse(words[2:]).resume == str(tmp_path / "run")


def test_comparison(started):
    calls = started("slurm_compare_ray.sh", OUT="/shared/out", SLURM_GPUS_ON_NODE="4")
    (words,) = (call for call in calls if call[0] == "foldconv")
    options = parse(words[1:])
    assert (options.ray, options.cpus_per_run, options.gpus_per_run) == ("n1:6379", 8, 0.25)
    assert recipes.find(options.config).is_file()
    steps = [call[call.index("ray") :] for call in calls if call[0] == "srun"]
    assert sorted("--head" in step for step in steps) == [False, True]
    assert all(step[step.index("--num-gpus") + 1] == "4" for step in steps)
    try:
        from ray.scripts.scripts import start
    except ImportError:
        return  # what Ray takes, the session `ray` tells
    for step in steps:
        start.make_context("ray start", step[2:])
