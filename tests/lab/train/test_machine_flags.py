"""Precision, memory layout, compilation and joined norms: each changes how a run computes, not what it leaves."""

import csv
import functools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.train import TrainConfig, fit, open_network, sharding
from foldconv.lab.train.classifier import Classifier
from foldconv.lab.train.devices import launch, quiet_lightning


def losses(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


@pytest.fixture
def seen(monkeypatch):
    """What the networks of runs look like while they train."""
    found, original = {"logits": set(), "channels_last": set()}, Classifier.outputs

    def watched(self, images, network=None):
        logits = original(self, images, network)
        if self.training:
            kernels = [p for p in self.network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
            found["logits"].add(logits.dtype)
            found["channels_last"] |= {p.is_contiguous(memory_format=torch.channels_last) for p in kernels}
        return logits

    monkeypatch.setattr(Classifier, "outputs", watched)
    return found


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("precision", "logits", "kept", "difference"),
    [
        ("bf16-mixed", torch.bfloat16, torch.float32, 0.02),
        ("bf16-true", torch.bfloat16, torch.bfloat16, 0.05),
        ("16-true", torch.float16, torch.float16, 0.02),
        ("64-true", torch.float64, torch.float64, 1e-3),
    ],
)
def test_precision(tiny, silent, tmp_path, seen, finished, precision, logits, kept, difference):
    """Trained in one type of number, deployed in float32, and nearly what float32 learns."""
    folder = tmp_path / "run"
    result = fit(tiny(precision=precision, ema=0.5, out=str(folder)), silent)
    assert seen["logits"] == {logits}
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {kept}
    assert {v.dtype for v in load_file(folder / "folded.safetensors").values() if v.is_floating_point()} == {
        torch.float32
    }
    assert result.accuracy_folded == result.accuracy_expanded
    assert result.max_output_difference < 1e-4
    assert losses(folder) == pytest.approx(losses(finished[0]), rel=difference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "16-mixed"}, "precision: 16-mixed needs a GPU; on a CPU expected bf16-mixed or 32-true"),
        ({"precision": "half"}, "Lightning does not take .*precision: half.*Allowed precision values"),
        ({"precision": "64-true", "strategy": "fsdp", "devices": 2}, "does not support .*'64-true'.*bf16-mixed"),
        ({"strategy": "ddp_spawn", "devices": 2}, "strategy: expected auto, ddp or fsdp.* received ddp_spawn with"),
        ({"sync_batchnorm": True, "strategy": "ddp", "devices": 2}, "sync_batchnorm: .* on GPUs only; on a CPU with 2"),
        ({"track_branches": True, "strategy": "fsdp", "devices": 2}, "track_branches: fsdp splits the kernels"),
    ],
)
def test_what_a_cpu_does_not_take_is_one_line(tiny, settings, message):
    with pytest.raises(UnsupportedError, match=message) as error, quiet_lightning():
        launch(tiny(**settings))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- layout and compilation


# Not four channels: on some processors torch's own kernels for this layout are not safe with so few.
WIDE = {"architecture_args": {"width": 8}}


@pytest.fixture
def wide(tiny, silent, tmp_path):
    """The folder of a finished run in torch's ordinary layout."""
    fit(tiny(**WIDE, out=str(tmp_path / "wide")), silent)
    return tmp_path / "wide"


def test_channels_last(tiny, silent, tmp_path, wide, seen):
    """The fold of a network that is laid out otherwise is laid out as ever, and the training is the same."""
    fit(tiny(**WIDE, channels_last=True, out=str(tmp_path / "run")), silent)
    assert seen["channels_last"] == {True}
    assert losses(tmp_path / "run") == pytest.approx(losses(wide), rel=1e-3)
    assert all(value.is_contiguous() for value in load_file(tmp_path / "run" / "folded.safetensors").values())


@pytest.fixture
def compiled_graphs():
    """How many graphs torch.compile has made since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compiled_training(tiny, silent, tmp_path, monkeypatch, wide, seen, compiled_graphs):
    """The whole way but the code generator, which takes a minute; names in checkpoints are those of any run."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    folder = tmp_path / "run"
    result = fit(tiny(**WIDE, compile=True, channels_last=True, out=str(folder)), silent)
    assert compiled_graphs() >= 2  # training and evaluation
    assert seen["channels_last"] == {True}
    assert losses(folder) == pytest.approx(losses(wide), rel=1e-3)
    keys = [torch.load(each / "last.ckpt", weights_only=True)["state_dict"].keys() for each in (folder, wide)]
    assert keys[0] == keys[1]
    assert result.accuracy_folded == result.accuracy_expanded


@pytest.mark.slow
def test_compiled_by_inductor(tiny, silent, tmp_path, monkeypatch, compiled_graphs):
    """The smallest network that trains, channels last, on generated code."""

    def small(num_classes, in_channels):
        return nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, num_classes)
        )

    monkeypatch.setitem(zoo._registry._BUILDERS, "small", small)
    config = {"architecture": "small", "architecture_args": {}, "epochs": 1, "batch_size": 479, "channels_last": True}
    fit(tiny(**config, out=str(tmp_path / "plain")), silent)
    assert not compiled_graphs()
    result = fit(tiny(**config, compile=True, out=str(tmp_path / "run")), silent)
    assert compiled_graphs() >= 2
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert result.accuracy_folded == result.accuracy_expanded


# ---------------------------------------------------------------------- joined batch norms


@pytest.fixture(params=["doconv", "dbb", "orepa", "repvgg"])
def trained(request):
    """A `Classifier` whose norms have seen images, and a function that saves it and opens the file."""
    torch.manual_seed(0)
    network = foldconv.expand(zoo.create("digits_resnet", width=4), request.param)
    network(torch.randn(16, 1, 8, 8))
    description = {
        "architecture": "digits_resnet",
        "architecture_args": {"width": 4},
        "layers": foldconv.files.native.describe_layers(network),
    }
    module = Classifier(network, TrainConfig(), 10)

    def saved(path):
        torch.save({"foldconv": description, "state_dict": module.state_dict(), "global_step": 1}, path)
        return open_network(path)[0]

    return module, saved


def norms(module):
    kinds = [type(each) for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    assert kinds
    return set(kinds)


def test_joined_norms_leave_the_checkpoint_as_it_is(trained, tmp_path):
    """The statistics themselves are joined on GPUs only."""
    module, saved = trained
    images = torch.randn(4, 1, 8, 8)
    expected = saved(tmp_path / "before.ckpt")(images)
    alone = SimpleNamespace(setup_module=lambda module: module)
    assert norms(sharding.distributed(module, alone, sync_batchnorm=False)) == {nn.BatchNorm2d}
    assert norms(sharding.distributed(module, alone, sync_batchnorm=True)) == {nn.SyncBatchNorm}
    received = saved(tmp_path / "after.ckpt")
    assert torch.equal(received(images), expected)
    assert torch.allclose(module.network.eval()(images), expected, atol=1e-5)
    assert torch.allclose(foldconv.fold(received)(images), expected, atol=1e-4)


def test_sharding_joins_norms_before_it_splits(trained, monkeypatch):
    """Splitting needs processes, see there."""
    kinds = []
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda network, mesh: kinds.append(norms(network)))
    strategy = sharding.ShardedStrategy()
    strategy._device_mesh = object()
    monkeypatch.setattr(sharding.ShardedStrategy, "root_device", torch.device("cpu"))
    monkeypatch.setattr(sharding.ShardedStrategy, "world_size", 2)
    for joined in (False, True):
        sharding.distributed(trained[0], strategy, joined)
    assert nn.SyncBatchNorm not in kinds[0]
    assert kinds[1] == {nn.SyncBatchNorm}
