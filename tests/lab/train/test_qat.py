"""Training through int8's rounding: what the quantizers see is what is deployed, and a run of it is as any other."""

import shutil

import pytest
import torch
from torch import nn

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab.train import TrainConfig, create_data, evaluate, fit, open_network, resume
from foldconv.lab.train.qat import QuantizationAware, check_packages


def state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.fixture
def installed():
    pytest.importorskip("torchao")
    pytest.importorskip("executorch")


def test_kernels_are_rounded_as_they_are_deployed_and_a_run_goes_on(installed, tiny, silent, tmp_path):
    whole = tmp_path / "whole"
    result = fit(tiny(qat=True, method="orepa", out=str(whole)), silent)
    content = state(whole)
    # Norms have counted batches of training only; a run cut off after its first epoch ends as the undisturbed one.
    counted = [int(value) for name, value in content["state_dict"].items() if name.endswith("num_batches_tracked")]
    assert set(counted) == {content["global_step"]}
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(whole / "config.yaml", resumed)
    shutil.copy(whole / "previous.ckpt", resumed / "last.ckpt")
    resume(resumed, silent)
    for part in ("state_dict", "quantizers"):
        for name, value in state(resumed)[part].items():
            assert torch.equal(value, content[part][name]), name

    network, _ = open_network(whole)
    assert evaluate(network, create_data("digits"))["accuracy"] == result.accuracy_expanded == result.accuracy_folded

    plain = foldconv.fold(network, batchnorm=True, example_inputs=torch.randn(2, 1, 8, 8))
    layers = [module for module in plain.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    scales = [value for name, value in content["quantizers"].items() if name.endswith(".scale") and len(value) > 1]
    assert len(scales) == len(layers) == 10
    for layer in layers:
        weight = layer.weight.detach().flatten(1)
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        # torch's fused operation spreads a channel of one sign over all 255 steps, though its scheme is symmetric.
        span = torch.where((low < 0) & (high > 0), 2 * torch.maximum(-low, high), high - low)
        assert any(len(scale) == len(span) and torch.allclose(255 * scale, span, rtol=0.01) for scale in scales)


def test_what_cannot_be_quantized_or_traced_is_refused(installed):
    rich = foldconv.expand(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "repvgg")
    with pytest.raises(UnsupportedError, match=r"qat: 0: repvgg runs branches with norms .* --pretrained RUN"):
        QuantizationAware(rich, (1, 8, 8))

    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    net = Asks(nn.Conv2d(1, 2, 3))
    with pytest.raises(UnsupportedError, match="qat: the network cannot be traced for training: ") as caught:
        QuantizationAware(net, (1, 8, 8))
    assert "\n" not in str(caught.value)
    quantized = QuantizationAware(nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 8, 8))
    with pytest.raises(ValueError, match=r"expected the state of .* received 1 of others"):
        quantized.load({"of_another": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": True}, "qat: expected compile: false with it, received True"),
        ({"precision": "bf16-mixed"}, "qat: expected precision: 32-true with it, received 'bf16-mixed'"),
        ({"devices": 2}, "qat: expected devices: 1"),
        ({"strategy": "fsdp"}, "qat: expected strategy: auto"),
    ],
)
def test_settings_that_do_not_go_with_it(settings, message):
    with pytest.raises(UnsupportedError, match=message):
        TrainConfig(qat=True, **settings)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_packages(TrainConfig())
    with pytest.raises(ModuleNotFoundError, match=r"qat: true needs torchao; install it: .*\[executorch\]"):
        check_packages(TrainConfig(qat=True))
