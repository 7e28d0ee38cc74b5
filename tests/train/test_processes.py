"""Two processes on the CPU train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from foldconv.errors import UnsupportedError
from foldconv.train import processes

CONFIG = {
    "data": "digits",
    "architecture": "normless",
    "method": "doconv",
    "epochs": 3,
    "batch_size": 718,  # two batches per epoch; the last one of the 1437 images is left out
    "lr": 0.05,
    "seed": 3,
    "accelerator": "cpu",
    "threads": 1,
}
PROGRAM = """
import sys
from torch import nn
from foldconv import zoo
from foldconv.cli import main

def normless(num_classes, in_channels):
    # Each process' batch norms would see its own images only, so one process and two would not agree.
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, num_classes)
    )

zoo._registry._BUILDERS["normless"] = normless
sys.exit(main(sys.argv[1:]))
"""


def train(folder, name, *options):
    (folder / "program.py").write_text(PROGRAM)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, str(folder / "program.py"), "train", *options]
    if "--resume" not in options:
        command += ["--config", str(folder / "config.yaml"), "--out", str(folder / name)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder)


def state(folder):
    return torch.load(Path(folder, "last.ckpt"), weights_only=True)["state_dict"]


@pytest.mark.skipif(os.name == "nt", reason="gloo between processes is tested on Unix")
def test_two_processes_match_one(tmp_path):
    one = train(tmp_path, "one")
    assert one.returncode == 0, one.stderr
    two = train(tmp_path, "two", "--devices", "2", "--strategy", "ddp")
    assert two.returncode == 0, two.stderr
    a, b = state(tmp_path / "one"), state(tmp_path / "two")
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.allclose(b[key].float(), value.float(), atol=1e-5), key
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines()[1:] for name in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        numbers = [[float(cell) for cell in row.split(",")] for row in (first, second)]
        assert numbers[1] == pytest.approx(numbers[0], abs=2e-5)
    # one report, one line per epoch, one folder
    assert len(two.stdout.split("test accuracy")) == 2
    assert [line.split()[0] for line in two.stderr.splitlines()] == ["run", "epoch", "epoch", "epoch"]
    assert "2 x cpu" in (tmp_path / "two" / "result.json").read_text()


def test_shares_of_a_batch():
    assert processes.share_of_batch(64, 2) == 32
    for size, count in ((64, 3), (2, 2)):
        with pytest.raises(UnsupportedError, match="expected a multiple of the number of processes"):
            processes.share_of_batch(size, count)


def test_the_other_processes_find_the_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FOLDCONV_RUN_FOLDER", raising=False)
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes.is_first()
    processes.share_folder(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not processes.is_first()
    assert processes.shared_folder(None) == tmp_path
    processes.forget_folder()
    assert processes.shared_folder("there") == Path("there")
    with pytest.raises(UnsupportedError, match="set out"):
        processes.shared_folder(None)
