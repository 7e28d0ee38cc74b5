"""Forwards that ask norms and convolutions for attributes, or set them: absorbing the norm would show."""

import pytest
import torch
from torch import Tensor, nn

import foldconv

X = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.double()

    def forward(self, x: Tensor):
        return self.norm(self.conv(x))


class AsksForBias(Net):
    def forward(self, x: Tensor):
        y = super().forward(x)
        return y * 2 if self.conv.bias is None else y


class AsksInALoop(Net):
    def forward(self, x: Tensor):
        for layer in self.children():
            x = layer(x)
            x = x * 2 if getattr(layer, "bias", None) is None else x
        return x


class AsksForEps(Net):
    def forward(self, x: Tensor):
        return super().forward(x) * self.norm.eps


class AsksByHelper(Net):
    def forward(self, x: Tensor):
        return super().forward(x) * channels_of(self.norm)


def channels_of(norm: nn.Module):
    return norm.num_features


class SetsMode(Net):
    """As networks do that adapt to what they are tested on."""

    def forward(self, x: Tensor):
        self.norm.train()
        return super().forward(x)


class SetsStride(Net):
    def forward(self, x: Tensor):
        self.conv.stride = (2, 2) if x.shape[-1] > 8 else (1, 1)
        return super().forward(x)


class StaysInTraining(Net):
    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.training = True
        return self


class StaysByEval(Net):
    def eval(self):
        super().eval()
        self.norm.train()
        return self


class SwitchesByItself(Net):
    """Which mode it is in, it keeps under another name."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.learns = mode
        return self

    def forward(self, x: Tensor):
        y = self.conv(x)
        return self.norm(y) if self.learns else self.norm(y) + y.mean()


class AsksForWhatStays(Net):
    def forward(self, x: Tensor):
        kernel, step = self.conv.kernel_size[0], self.conv.stride[0]
        return super().forward(x) * (kernel + step + self.conv.weight.shape[1]) * (1 + self.norm.training)


def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for statistic in (module.running_mean, module.running_var):
                assert statistic is not None
                nn.init.uniform_(statistic, 0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize("inputs", [None, X])
@pytest.mark.parametrize(
    "cls",
    [
        *(AsksForBias, AsksInALoop, AsksForEps, AsksByHelper, SetsMode, SetsStride),
        *(StaysInTraining, StaysByEval, SwitchesByItself),
    ],
)
def test_the_norm_stays(cls: type[Net], inputs: Tensor | None):
    net = trained(cls().train()).eval()
    rich = trained(foldconv.expand(net, "doconv")).eval()
    plain = foldconv.fold(rich, batchnorm=True, example_inputs=inputs)
    assert type(plain.norm) is nn.BatchNorm2d
    assert (plain.eval()(X) - rich(X)).abs().max() < 1e-12
    with pytest.raises(foldconv.NoMatchError):
        foldconv.expand(net.train(), "repvgg", example_inputs=inputs)


@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_what_absorbing_leaves_may_be_asked_for(method: str):
    rich = trained(foldconv.expand(trained(AsksForWhatStays()), method)).eval()
    plain = foldconv.fold(rich, batchnorm=True)
    assert type(plain.norm) is nn.Identity
    assert (plain(X) - rich(X)).abs().max() < 1e-12


def test_the_reason_is_said():
    assert "asks for its attributes" in foldconv.plan(AsksForEps(), "repvgg").rows[0].evidence
    assert "asks whether it has a bias" in foldconv.plan(AsksForBias(), "repvgg").rows[0].evidence


def test_a_model_whose_eval_changes_it_is_followed_by_its_flags():
    class Merges(Net):
        def train(self, mode: bool = True):
            if not mode and isinstance(self.norm, nn.BatchNorm2d):
                self.extra = nn.Identity()
            return super().train(mode)

    net = Merges().train()
    assert foldconv.plan(net, "repvgg").taken == ["conv"]
    assert not hasattr(net, "extra")


class Renamed(Net):
    def train(self, is_training: bool = True):
        super().train(is_training)
        self.norm.training = True
        return self


class PassesOn(Net):
    def train(self, *args: bool):
        super().train(*args)
        self.norm.training = True
        return self


@pytest.mark.parametrize("cls", [Renamed, PassesOn])
def test_a_switch_may_name_its_mode_as_it_likes(cls: type[Net]):
    assert foldconv.plan(cls().train(), "repvgg").taken == []


def test_a_train_that_cannot_be_called_is_no_switch():
    net = Net()
    net.__dict__["train"] = None
    assert foldconv.plan(net, "repvgg").taken == ["conv"]


def test_a_train_that_is_no_switch_is_not_called():
    class Trainer(Net):
        def train(self, trainer: object = None, **kwargs: object):
            raise AssertionError("a training has begun")

    assert foldconv.plan(Trainer(), "repvgg").taken == ["conv"]


def test_modules_of_torch_are_as_before():
    foldconv.plan(Net(), "repvgg", example_inputs=X)
    assert "__getattribute__" not in vars(nn.Module)
    assert nn.Module.__setattr__.__module__ == "torch.nn.modules.module"
