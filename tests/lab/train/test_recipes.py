"""Each option of a recipe does what it says, and a run cut off with all of them on ends with the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import foldconv
from foldconv.errors import CheckpointError, UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.train import TrainConfig, fit, open_network, resume
from foldconv.lab.train.classifier import Classifier
from foldconv.lab.train.loop import Training
from foldconv.lab.train.optimizers import create_optimizer, create_schedule, training_groups

EVERYTHING = {
    "optimizer": "adamw",
    "lr": 0.01,
    "schedule": "cosine",
    "warmup_epochs": 1,
    "ema": 0.9,
    "accumulate": 4,  # of 6 batches: the last step of an epoch has 2
    "mixup": 0.2,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "clip_gradient": 1.0,
    "stem_lr_factor": 0.5,
    "bias_lr_factor": 2.0,
}


def state(folder, name="last.ckpt"):
    return torch.load(folder / name, weights_only=True)


def same(first, second):
    a, b = state(first)["state_dict"], state(second)["state_dict"]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------- groups, optimizers, schedules


def test_stem_and_biases_have_their_own_rate():
    net = foldconv.expand(zoo.create("digits_resnet", width=4), "doconv")
    groups = training_groups(net, 0.25, 0.1, stem_factor=0.5, bias_factor=2.0)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(list(net.parameters()))
    assert found[id(net.stem[0].weight)] == (0.05, 0.25)
    assert found[id(net.stem[1].weight)] == (0.1, 0.0)
    assert found[id(net.stem[1].bias)] == (0.1, 0.0)  # a norm's bias is no convolution's
    assert found[id(net.head.weight)] == (0.1, 0.25)
    assert found[id(net.head.bias)] == (0.2, 0.0)
    assert groups[0]["lr"] == 0.1  # what logs show


@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "momentum"])
def test_timms_optimizers(name):
    net = nn.Linear(2, 2)
    config = TrainConfig(optimizer=name, lr=0.01)
    before = net.weight.detach().clone()
    optimizer = create_optimizer(training_groups(net, 1e-4, config.lr), config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamv"}, "unknown optimizer of timm 'adamv'; did you mean 'adam"),
        ({"optimizer": "adamw", "optimizer_args": {"beta": 3}}, r"optimizer_args of 'adamw' \(given: beta\)"),
        ({"optimizer_args": {"betas": 3}}, r"optimizer_args of 'sgd' \(given: betas\)"),
        ({"schedule_args": {"pct": 3}}, "schedule_args of 'onecycle'"),
        (
            {"schedule": "step", "schedule_args": {"milestone": 3}},
            "unknown option 'milestone'; did you mean 'milestones'",
        ),
        ({"schedule": "step", "schedule_args": {"milestones": "3"}}, "milestones: expected a list of epochs"),
        ({"schedule": "cosine", "schedule_args": {"final": "low"}}, "final: expected a number, received 'low'"),
        ({"precision": "33-true"}, "Lightning does not take .*precision: 33-true"),
        ({"strategy": "dpp"}, "Lightning does not take .*strategy: dpp"),
        ({"devices": 0}, "devices: expected how many, or -1 for all, received 0"),
        ({"warmup_epochs": 1}, "onecycle warms up itself"),
        ({"ema": 1}, "ema: expected a number ≥ 0 and < 1, received 1"),
        ({"download": 3}, "download: expected true or false, received 3"),
        ({"include": 3}, "include: expected a pattern or a list of patterns, received 3"),
        ({"pretrained": "x.pth"}, "init 'paper' would draw the weights anew"),
    ],
)
def test_bad_recipes_are_named_and_leave_nothing(tiny, silent, tmp_path, settings, message):
    with pytest.raises(UnsupportedError, match=message):
        fit(tiny(**settings, out=str(tmp_path / "run")), silent)
    assert os.listdir(tmp_path) == []


def rates(steps=8, epochs=4, **settings):
    config = TrainConfig(epochs=epochs, lr=2.0, **settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = create_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules():
    assert rates(schedule="constant") == [2.0] * 8
    assert rates(schedule="constant", warmup_epochs=2) == [0, 0.5, 1, 1.5, 2, 2, 2, 2]
    steps = rates(schedule="step", schedule_args={"milestones": [1, 3], "factor": 0.5})
    assert steps == [2, 2, 1, 1, 1, 1, 0.5, 0.5]
    assert rates(schedule="step") == pytest.approx([2] * 4 + [0.2] * 2 + [0.02] * 2)
    cosine = rates(schedule="cosine", warmup_epochs=2, schedule_args={"final": 0.5})
    assert cosine == pytest.approx([0, 0.5, 1, 1.5, 2, 1.5 + 0.5 * 2**-0.5, 1.5, 1.5 - 0.5 * 2**-0.5])


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(schedule="cosine") == pytest.approx(expected)


# ---------------------------------------------------------------------- the loss, the average


def test_include_and_exclude(tiny, silent, tmp_path):
    result = fit(tiny(epochs=1, include="blocks.*", exclude=["blocks.0.*"], out=str(tmp_path / "run")), silent)
    network, _ = open_network(tmp_path / "run" / "last.ckpt")
    names = list(foldconv.network.tree.foldable_layers(network))
    assert names
    assert all(name.startswith("blocks.") and not name.startswith("blocks.0.") for name in names)
    assert result.accuracy_expanded == result.accuracy_folded


def test_label_smoothing_and_mixing_change_the_loss():
    batch = torch.randn(8, 1, 8, 8), torch.arange(8)
    losses = []
    for settings in ({}, {"label_smoothing": 0.2}, {"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}):
        torch.manual_seed(0)
        module = Classifier(zoo.create("digits_resnet", width=4), TrainConfig(**settings), 10)
        losses.append(module(*batch)[0].item())
    assert len({round(loss, 6) for loss in losses[:4]}) == 4
    assert losses[4] in losses[2:4] or losses[4] not in losses[:2]


def test_average_follows_its_formula_and_is_what_counts(tiny, silent, tmp_path, monkeypatch):
    weights, original = [], Training._batch

    def watched(self, images, labels, index):
        head, before = self.module.network.head.weight, self.step
        if not weights:
            weights.append(head.detach().clone())
        found = original(self, images, labels, index)
        if self.step > before:
            weights.append(head.detach().clone())
        return found

    with monkeypatch.context() as context:
        context.setattr(Training, "_batch", watched)
        result = fit(tiny(ema=0.8, accumulate=2, out=str(tmp_path / "run")), silent)
    average, *weights = weights
    assert len(weights) == 6  # 2 epochs of 3 steps of 2 batches
    for weight in weights:
        average = 0.8 * average + 0.2 * weight
    network, _ = open_network(tmp_path / "run" / "last.ckpt")
    assert torch.allclose(network.head.weight, average, atol=1e-6)
    assert not torch.allclose(network.head.weight, weights[-1], atol=1e-4)
    folded, _ = open_network(tmp_path / "run" / "folded.safetensors")
    assert torch.equal(folded.head.weight, network.head.weight)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[4]) == pytest.approx(result.accuracy_expanded, abs=1e-5)


def test_accumulated_batches_are_one_large_batch(tiny, silent, tmp_path, monkeypatch):
    """Without norms: 3 x 479 images are 1437 images, also where 4 batches were to be averaged."""

    class Plain(nn.Sequential):
        def __init__(self, num_classes, in_channels):
            super().__init__(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))

    monkeypatch.setitem(zoo._registry._BUILDERS, "normless", Plain)
    config = {"architecture": "normless", "architecture_args": {}, "epochs": 1, "weight_decay": 0, "lr": 0.01}
    fit(tiny(**config, schedule="constant", batch_size=479, out=str(tmp_path / "a")), silent)
    two = fit(tiny(**config, schedule="constant", batch_size=479, accumulate=3, out=str(tmp_path / "c")), silent)
    fit(tiny(**config, schedule="constant", batch_size=479, accumulate=4, out=str(tmp_path / "e")), silent)
    one = fit(tiny(**config, schedule="constant", batch_size=1437, out=str(tmp_path / "d")), silent)
    key = "network.3.weight"
    for run in ("c", "e"):
        found = state(tmp_path / run)["state_dict"][key]
        assert torch.allclose(found, state(tmp_path / "d")["state_dict"][key], atol=1e-6)
    assert not torch.allclose(
        state(tmp_path / "a")["state_dict"][key], state(tmp_path / "d")["state_dict"][key], atol=1e-5
    )
    assert two.accuracy_folded == one.accuracy_folded


# Eight channels: on some processors torch's own kernels for channels_last are not safe with four.
@pytest.mark.parametrize(
    "settings", [{"channels_last": True, "architecture_args": {"width": 8}}, {"precision": "bf16-mixed"}]
)
def test_machine_options_train_and_fold(tiny, silent, tmp_path, settings):
    result = fit(tiny(**settings, out=str(tmp_path / "run")), silent)
    assert result.accuracy_folded == result.accuracy_expanded > 0.2
    assert result.max_output_difference < 1e-4


def test_result_tells_seed_time_memory_and_device(tiny, silent, tmp_path):
    result = fit(tiny(seed=5, out=str(tmp_path / "run")), silent)
    assert (result.seed, result.device, result.images_skipped) == (5, "cpu", 0)
    assert 0 < result.training_seconds < result.seconds
    assert result.peak_memory > 50_000_000  # torch alone is more
    assert json.loads((tmp_path / "run" / "result.json").read_text())["training_seconds"] == result.training_seconds


# ---------------------------------------------------------------------- cut off and continued


def test_resumed_run_with_everything_equals_an_undisturbed_one(tiny, silent, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(tiny(**EVERYTHING, epochs=4, out=str(whole)), silent)
    original = Training._batch

    def interrupted(self, images, labels, index):
        if self.epoch == 2 and index == 3:
            raise KeyboardInterrupt
        return original(self, images, labels, index)

    with monkeypatch.context() as context:
        context.setattr(Training, "_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny(**EVERYTHING, epochs=4, out=str(broken)), silent)
    torch.manual_seed(12345)
    older = shutil.copytree(broken, tmp_path / "older")
    resume(broken, silent)
    assert same(whole, broken)
    assert (broken / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()

    # As Lightning's Trainer wrote it for earlier versions.
    content = state(older)
    del content["precision"]
    content["callbacks"]["Stopwatch"] = {"seconds": content.pop("seconds")}
    torch.save(content | {"loops": {}, "pytorch-lightning_version": "2.5.0"}, older / "last.ckpt")
    resume(older, silent)
    assert same(whole, older)


@pytest.mark.parametrize(("precision", "ema"), [("bf16-true", 0.5), ("64-true", 0)])
def test_resumed_in_another_precision(tiny, silent, tmp_path, precision, ema):
    """All digits are kept, and timm's random rounding of averages in bfloat16 is repeated."""
    fit(tiny(precision=precision, ema=ema, epochs=3, out=str(tmp_path / "whole")), silent)
    broken = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    os.replace(broken / "previous.ckpt", broken / "last.ckpt")
    resume(broken, silent)
    assert same(tmp_path / "whole", broken)


@pytest.mark.parametrize("missing", ["optimizer_states", "epoch", "callbacks", "network.head.bias"])
def test_a_checkpoint_that_lacks_something_is_one_line(finished, silent, tmp_path, missing):
    content = state(finished[0])
    del (content if missing in content else content["state_dict"])[missing]
    torch.save(content, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_bytes((finished[0] / "config.yaml").read_bytes())
    with pytest.raises(CheckpointError, match=rf"last\.ckpt: .*{missing}") as error:
        resume(tmp_path, silent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "truncated", "a flipped bit"])
def test_damaged_checkpoint_falls_back_to_the_one_before(finished, silent, tmp_path, damage):
    broken = shutil.copytree(finished[0], tmp_path / "broken")
    content = bytearray((broken / "last.ckpt").read_bytes())
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 4
    else:
        del content[{"empty": 0, "truncated": 5000}[damage] :]
    (broken / "last.ckpt").write_bytes(content)
    previous = (broken / "previous.ckpt").read_bytes()
    assert state(broken, "previous.ckpt")["global_step"] == 6
    resume(broken, silent)
    (told,) = [line for line in silent.file.getvalue().splitlines() if "last.ckpt" in line]
    assert told.startswith(f"{broken / 'last.ckpt'}: ")
    assert told.endswith("; continuing from previous.ckpt")
    assert same(finished[0], broken)
    assert (broken / "previous.ckpt").read_bytes() == previous  # not pushed out by the damaged one
    assert (broken / "damaged-last.ckpt").read_bytes() == content


def test_kept_checkpoints(tiny, silent, tmp_path):
    fit(tiny(epochs=4, keep=3, best=False, out=str(tmp_path / "three")), silent)
    fit(tiny(epochs=2, keep=1, best=False, out=str(tmp_path / "one")), silent)
    names = ["last.ckpt", "previous-2.ckpt", "previous.ckpt"]
    assert sorted(name for name in os.listdir(tmp_path / "three") if name.endswith("ckpt")) == names
    steps = [state(tmp_path / "three", name)["global_step"] for name in names]
    assert steps == [24, 12, 18]
    assert sorted(name for name in os.listdir(tmp_path / "one") if name.endswith("ckpt")) == ["last.ckpt"]


@pytest.mark.skipif(os.name == "nt", reason="sends a Unix signal")
def test_killed_at_any_moment_and_resumed(tiny, tmp_path):
    """Each part in a process of its own, as users train: what others have set in this one changes how sums round."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = tiny(**EVERYTHING, epochs=24)
    config.save(tmp_path / "config.yaml")
    program = [sys.executable, "-m", "foldconv", "train"]
    start = [*program, "--config", str(tmp_path / "config.yaml"), "--no-baseline", "--out"]
    again = [*program, "--resume", str(broken)]
    undisturbed = subprocess.Popen([*start, str(whole)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for attempt, delay in enumerate((0.013, 0.31)):
        command = again if attempt else [*start, str(broken)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = (broken / "metrics.csv").stat().st_mtime_ns if attempt else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (broken / "metrics.csv").exists() and (broken / "metrics.csv").stat().st_mtime_ns > before:
                break
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not (broken / "result.json").exists()
    subprocess.run(again, check=True, capture_output=True)
    _, errors = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, errors
    assert same(whole, broken)


def test_more_epochs_than_the_schedule_has_are_one_line(finished, silent, tmp_path):
    broken = shutil.copytree(finished[0], tmp_path / "broken")
    config = (broken / "config.yaml").read_text()
    (broken / "config.yaml").write_text(config.replace("epochs: 2\n", "epochs: 3\n", 1))
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .* its schedule ends before step 18; continue with the"):
        resume(broken, silent)


def test_another_number_of_classes_is_one_line(finished, silent, tmp_path):
    content = state(finished[0])
    content["foldconv"]["architecture_args"]["num_classes"] = 7
    torch.save(content, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_bytes((finished[0] / "config.yaml").read_bytes())
    with pytest.raises(CheckpointError, match=r"last\.ckpt: made for 7 classes; 'digits' has 10"):
        resume(tmp_path, silent)
