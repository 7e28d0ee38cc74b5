"""Two processes on the CPU train what one process trains, however they are started and whatever ends them."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from foldconv.errors import UnsupportedError
from foldconv.lab.train import TrainConfig, open_network, processes
from foldconv.lab.train.devices import launch
from foldconv.lab.train.divergence import DivergedError, Losses

PROGRAM = Path(__file__).with_name("process_runs.py")
BASE = {"data": "digits", "method": "doconv", "lr": 0.05, "seed": 3, "accelerator": "cpu", "threads": 1}
NORMLESS = {
    **BASE,
    "architecture": "normless",
    "baseline": False,
    "epochs": 2,
    "batch_size": 718,  # two batches per epoch; the last one of the 1437 images is left out
    "schedule": "constant",
    "weight_decay": 0.01,
    "clip_gradient": 0.5,
}
NORMS = {
    **BASE,
    "architecture_args": {"width": 4},
    "method": "dbb",
    "epochs": 1,
    "batch_size": 360,
}
DDP, FSDP = (["--devices", "2", "--strategy", name] for name in ("ddp", "fsdp"))
SUMMED = ["--accumulate", "2", "--ema", "0.5"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def torchrun():
    """What torchrun tells two processes of one machine."""
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    both |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    return [{**both, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def two_machines():
    """What their users set on two machines for Lightning."""
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [{**both, "NODE_RANK": rank} for rank in "01"]


def jobs():
    def train(name, started, *options, config="normless", **others):
        arguments = ["train", "--config", f"{config}.yaml", "--out", name, *options]
        return {"name": name, "arguments": arguments, "processes": started, **others}

    def resume(name, started):
        return {"name": f"{name}-resumed", "arguments": ["train", "--resume", name], "processes": started}

    third_step = {"stop_at": 3}  # of four, in the second epoch
    yield train("one", [{}])
    yield train("launched", [{}], *DDP)
    yield train("machines", two_machines(), "--nodes", "2", "--strategy", "ddp")
    yield train("killed", torchrun(), *DDP, signal=signal.SIGKILL, **third_step)
    yield resume("killed", torchrun())
    yield train("fsdp", torchrun(), *FSDP)
    yield train("interrupted", torchrun(), *FSDP, signal=signal.SIGINT, **third_step)
    yield {"name": "alone", "arguments": ["train", "--resume", "alone"], "processes": [{}], "copy": "interrupted"}
    yield resume("interrupted", torchrun())
    yield train("summed-one", [{}], *SUMMED)
    yield train("summed", torchrun(), *DDP, *SUMMED)
    yield train("compiled", torchrun(), *FSDP, "--compile", backend="aot_eager")
    yield train("halves", torchrun(), *FSDP, "--precision", "bf16-true")
    yield train("norms", torchrun(), *FSDP, config="norms")
    yield train("norms-ddp", torchrun(), *DDP, config="norms")
    yield train("diverged", torchrun(), *DDP, "--lr", "1e30", "--clip-gradient", "0")
    nowhere = train("nowhere", torchrun(), *DDP)
    yield {**nowhere, "arguments": [*nowhere["arguments"][:3], *DDP]}


class Runs:
    """The folder of all runs and what their processes left."""

    def __init__(self, folder, codes):
        self.folder, self.codes = folder, codes

    def checkpoint(self, name):
        return torch.load(self.folder / name / "last.ckpt", weights_only=True)

    def output(self, name, number=0, kind="txt"):
        return (self.folder / f"{name}-{number}.{kind}").read_text()

    def seen(self, name, what):
        """What each process of a run found when training ended."""
        return [json.loads(self.output(name, number, "seen"))[what] for number in (0, 1)]

    def compare(self, name, other, **tolerance):
        """The state of two runs is the same, up to a tolerance where there is one."""
        a, b = (self.checkpoint(each)["state_dict"] for each in (name, other))
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.allclose(value, b[key], **{"rtol": 0, "atol": 0, **tolerance}), key
        return a, b


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    if os.name == "nt":
        pytest.skip("gloo between forked processes is tested on Unix")
    folder = tmp_path_factory.mktemp("processes")
    for name, config in (("normless", NORMLESS), ("norms", NORMS)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    program = [sys.executable, PROGRAM, "jobs"]
    given = json.dumps([*jobs()])
    ended = subprocess.run(program, input=given, capture_output=True, text=True, cwd=folder, env=environment)
    assert ended.returncode == 0, ended.stderr
    return Runs(folder, json.loads(ended.stdout))


# ---------------------------------------------------------------------- the same as one process


@pytest.mark.parametrize(
    ("name", "other"), [("machines", "one"), ("fsdp", "one"), ("compiled", "one"), ("summed", "summed-one")]
)
def test_two_processes_match_one(runs, name, other):
    assert runs.codes[name] == [0, 0]
    a, _ = runs.compare(other, name, atol=1e-6)
    first = torch.load(runs.folder / other / "previous.ckpt", weights_only=True)["state_dict"]
    assert any((value - first[key]).abs().max() > 1e-3 for key, value in a.items())  # they moved
    rows = [(runs.folder / each / "metrics.csv").read_text().splitlines()[1:] for each in (other, name)]
    for expected, received in zip(*rows, strict=True):
        numbers = [[float(cell) for cell in row.split(",")] for row in (received, expected)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-5)
    folded = [load_file(runs.folder / each / "folded.safetensors") for each in (other, name)]
    assert all(torch.allclose(value, folded[1][key], atol=1e-6) for key, value in folded[0].items())


def test_one_process_reports(runs):
    lines = runs.output("machines").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "epoch", "epoch"]
    assert runs.output("machines", 1) == ""
    assert json.loads((runs.folder / "machines" / "result.json").read_text())["device"] == "2 x cpu"


def test_lightning_starts_the_second_process(runs):
    """As on a user's own machine; the result is that of any other way to start two."""
    assert runs.codes["launched"] == [0], runs.output("launched")
    runs.compare("machines", "launched")
    # one report, one line per epoch, one folder
    lines = [line.split()[0] for line in runs.output("launched").splitlines() if line]
    assert [lines.count(word) for word in ("run", "epoch", "parameters")] == [2, 2, 1]
    assert "2 x cpu" in (runs.folder / "launched" / "result.json").read_text()


# ---------------------------------------------------------------------- split parameters


def test_fsdp_splits_parameters_among_processes(runs):
    held = {name: runs.seen(name, "held") for name in ("machines", "fsdp")}
    total = json.loads((runs.folder / "one" / "result.json").read_text())["parameters_training"]
    assert held["machines"] == [total, total]
    assert sum(held["fsdp"]) == total
    assert all(0.3 * total < count < 0.7 * total for count in held["fsdp"])


def test_fsdp_checkpoints_are_those_of_any_run(runs):
    """Whole tensors and plain values, the optimizer's state under the same names."""
    one, split = runs.checkpoint("one"), runs.checkpoint("fsdp")
    assert all(type(value) is torch.Tensor for value in split["state_dict"].values())
    states = [content["optimizer_states"][0]["state"] for content in (one, split)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert torch.allclose(state["momentum_buffer"], states[1][number]["momentum_buffer"], atol=1e-6)


def test_fsdp_in_half_precision(runs):
    assert runs.codes["halves"] == [0, 0]
    state = runs.checkpoint("halves")["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    one = runs.checkpoint("one")["state_dict"]
    assert all(torch.allclose(value.float(), one[key], atol=0.02) for key, value in state.items())


@pytest.mark.parametrize("name", ["norms", "norms-ddp"])
def test_processes_with_norms_agree_on_what_is_evaluated(runs, name):
    """Each saw other images; the accuracy of both together is the one that the deployed network has."""
    assert runs.codes[name] == [0, 0]
    with open(runs.folder / name / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    result = json.loads((runs.folder / name / "result.json").read_text())
    assert float(row["test_accuracy"]) == pytest.approx(result["accuracy_expanded"], abs=1e-6)
    assert result["accuracy_expanded"] == result["accuracy_folded"]
    network, _ = open_network(runs.folder / name / "last.ckpt")
    loss = nn.functional.cross_entropy
    images, labels = TrainConfig(**NORMS).open_data().test.tensors
    with torch.no_grad():
        expected = loss(network(images), labels).item()
    assert float(row["test_loss"]) == pytest.approx(expected, abs=1e-4)


def test_validation_composes_once(runs):
    """One layer, three batches of images, two epochs; split parameters can only be composed at each forward."""
    for name in ("machines", "summed"):
        assert runs.seen(name, "composed") == [[1, 1], [1, 1]]
    assert min(runs.seen("fsdp", "composed")[0]) > 1


# ---------------------------------------------------------------------- cut off


def test_killed_processes_resume_to_the_same_weights(runs):
    assert runs.codes["killed"] == [-signal.SIGKILL, -signal.SIGKILL]
    assert "epoch 2/2" not in runs.output("killed")
    assert runs.codes["killed-resumed"] == [0, 0]
    assert "epoch 1/2" not in runs.output("killed-resumed")
    runs.compare("machines", "killed")


def test_interrupted_fsdp_resumes_to_the_same_weights(runs):
    assert runs.codes["interrupted"] == [130, 1]
    last = "foldconv: stopped; continue with: foldconv train --resume interrupted"
    assert runs.output("interrupted").splitlines()[-1] == last
    assert runs.output("interrupted", 1) == ""
    assert runs.codes["interrupted-resumed"] == [0, 0]
    runs.compare("fsdp", "interrupted")


def test_a_run_of_two_processes_goes_on_in_one(runs):
    assert runs.codes["alone"] == [0]
    assert "epoch 1/2" not in runs.output("alone")
    runs.compare("one", "alone", atol=1e-6)


# ---------------------------------------------------------------------- errors


def test_divergence_is_told_once(runs):
    assert runs.codes["diverged"] == [1, 1]
    (line,) = [line for line in runs.output("diverged").splitlines() if "error" in line]
    assert "not finite at step 2 (epoch 1); the last good checkpoint is diverged/last.ckpt" in line
    assert runs.output("diverged", 1) == ""


@pytest.fixture
def alone_in_a_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_divergence_of_split_weights(alone_in_a_group, tmp_path):
    """Each process looks at its share; the loss need not have been bad."""
    network = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    assert isinstance(network.weight, DTensor)

    def reduced(tensor, reduce_op):
        assert type(tensor) is torch.Tensor  # what torch.distributed takes
        return tensor

    fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"), all_reduce=reduced)
    losses = Losses(fabric, 1, tmp_path / "last.ckpt")
    losses.add(7, torch.ones(()), torch.ones(()), torch.tensor(3), 4)
    assert losses.means(7, network.parameters()) == {"train_loss": 1.0, "train_accuracy": 0.75}
    network.weight.detach().to_local()[1, 1] = torch.nan
    with pytest.raises(DivergedError, match="not finite at step 7"):
        losses.means(7, network.parameters())


def test_processes_that_others_start_need_a_folder(runs):
    assert runs.codes["nowhere"] == [1, 1]
    assert all("out: a run whose processes torchrun" in runs.output("nowhere", number) for number in (0, 1))
    assert not (runs.folder / "runs").exists()


def test_shares_of_a_batch():
    assert processes.share_of_batch(64, 2) == 32
    for size, count in ((64, 3), (2, 2)):
        with pytest.raises(UnsupportedError, match="expected a multiple of the number of processes"):
            processes.share_of_batch(size, count)


def test_a_batch_that_cannot_be_shared_is_refused_before_other_processes_start(monkeypatch):
    monkeypatch.setattr(Fabric, "launch", lambda _: pytest.fail("started"))
    with pytest.raises(UnsupportedError, match=r"expected a multiple of the number of processes \(5\)"):
        launch(TrainConfig(accelerator="cpu", devices=5))


# ---------------------------------------------------------------------- which process is the first


@pytest.fixture
def launched(monkeypatch):
    """Set what a launcher sets, and nothing else."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "FOLDCONV_")) or name in LAUNCHERS:
            monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
SRUN = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("told", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0", **SRUN}, True),
        ({"SLURM_PROCID": "1", **SRUN}, False),
        ({"SLURM_PROCID": "1", **SRUN, "SLURM_JOB_NAME": "interactive"}, True),  # Lightning starts the others itself
        ({"SLURM_PROCID": "0", **SRUN, "TORCHELASTIC_RUN_ID": "1", "RANK": "1"}, False),  # torchrun inside Slurm
    ],
)
def test_the_first_process(launched, told, first):
    launched(**told)
    assert processes.is_first(TrainConfig(devices=2)) is first
    assert processes.is_first(TrainConfig())  # a run of one process, whatever started it


@pytest.mark.parametrize(
    ("told", "config", "enough"),
    [
        ({}, {"devices": 2}, True),
        ({}, {"nodes": 2}, False),
        ({}, {"nodes": 2, "out": "run"}, True),
        ({"WORLD_SIZE": "2"}, {"devices": 2}, False),
        ({"WORLD_SIZE": "2", "FOLDCONV_RUN_FOLDER": "run"}, {"devices": 2}, True),
        ({"SLURM_PROCID": "0", **SRUN}, {"devices": 2}, False),
        ({"SLURM_PROCID": "0", **SRUN}, {"devices": 1}, True),
        ({"SLURM_PROCID": "0", **SRUN, "SLURM_NTASKS": "1"}, {"devices": -1}, True),
    ],
)
def test_who_knows_the_folder(launched, told, config, enough):
    launched(**told)
    if enough:
        processes.check_folder(TrainConfig(**config))
    else:
        with pytest.raises(UnsupportedError, match="expected a path, received none"):
            processes.check_folder(TrainConfig(**config))


def test_the_other_processes_find_the_folder(launched, tmp_path):
    processes.share_folder(tmp_path)
    assert processes.shared_folder(TrainConfig()) == tmp_path
    processes.forget_folder()
    assert processes.shared_folder(TrainConfig(out="there")) == Path("there")
