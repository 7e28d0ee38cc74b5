"""`verify` sees real differences, in the right layer, and keeps both networks as they were."""

import math

import pytest
import torch
from torch import nn

import foldconv
from foldconv import UnsupportedError
from foldconv.testing import randomize


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x, scale=1.0):
        x = self.norm(self.stem(x)).relu()
        x = x + self.conv(x) * scale
        return {"logits": self.head(x.mean((2, 3))), "features": [x]}


@pytest.fixture
def rich():
    torch.manual_seed(0)
    net = foldconv.expand(Residual(), "doconv")
    randomize(net)
    return net


X = torch.randn(2, 3, 8, 8)


def test_a_right_fold_is_ok_and_every_layer_is_listed(rich):
    report = foldconv.verify(rich, foldconv.fold(rich), X)
    assert [(layer.name, layer.layer) for layer in report.layers] == [("stem", "DOConv2d"), ("conv", "DOConv2d")]
    assert 0 < report.max_error < 1e-5
    assert report.ok(1e-5)
    assert not report.ok(0.0)
    assert not report.uncompared
    table = str(report)
    assert f"{report.max_error:.1e}" in table
    assert all(name in table for name in ("stem", "conv", "whole network"))


def test_an_absorbed_norm_is_compared_with_its_convolution(rich):
    report = foldconv.verify(rich, foldconv.fold(rich, batchnorm=True), X)
    assert [layer.name for layer in report.layers] == ["stem", "conv"]
    assert report.ok(1e-5)


def test_a_norm_absorbed_into_a_plain_convolution_is_listed():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    randomize(net)
    report = foldconv.verify(net, foldconv.fold(net, batchnorm=True), X)
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.ok(1e-5)


@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_wrong_layer_is_found_and_named(rich, batchnorm):
    folded = foldconv.fold(rich, batchnorm=batchnorm)
    with torch.no_grad():
        folded.conv.weight[0, 0, 0, 0] += 0.5
    report = foldconv.verify(rich, folded, X)
    errors = {layer.name: layer.error for layer in report.layers}
    # Each layer gets the same input on both sides, so the sound one stays sound.
    assert errors["stem"] < 1e-5 < 0.01 < errors["conv"]
    assert report.max_error > 1e-3
    assert not report.ok(1e-5)


def test_layers_followed_by_changes_in_place_are_compared_before_them():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.Sigmoid())
    rich = foldconv.expand(net, "doconv")
    randomize(rich)
    assert foldconv.verify(rich, foldconv.fold(rich), X).ok(1e-5)


def test_an_absorbed_norm_after_a_convolution_with_bias_is_compared():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    randomize(net)
    report = foldconv.verify(net, foldconv.fold(net, batchnorm=True), X)
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.ok(1e-5)


@pytest.mark.parametrize("batchnorm", [False, True])
def test_branches_with_norms_are_compared_behind_the_norm(batchnorm):
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    rich = foldconv.expand(net, "repvgg")
    randomize(rich)
    folded = foldconv.fold(rich, batchnorm=batchnorm)
    report = foldconv.verify(rich, folded, X)
    assert [(layer.name, layer.layer) for layer in report.layers] == [("0", "BranchedConv")]
    assert report.ok(1e-5)
    with torch.no_grad():
        (folded[0] if batchnorm else folded[1]).bias[0] += 1
    assert foldconv.verify(rich, folded, X).layers[0].error > 0.5


def test_nan_is_never_ok(rich):
    folded = foldconv.fold(rich)
    with torch.no_grad():
        folded.head.weight[0, 0] = math.nan
    report = foldconv.verify(rich, folded, X)
    assert math.isnan(report.max_error)
    assert not report.ok(math.inf)


def test_modes_come_back_and_no_hook_is_left(rich):
    folded = foldconv.fold(rich)
    rich.train()
    rich.norm.eval()
    foldconv.verify(rich, folded, X)
    assert rich.training
    assert rich.stem.training
    assert not rich.norm.training
    assert not any(m._forward_hooks for m in rich.modules())


def test_arguments_as_tuple_and_by_name(rich):
    folded = foldconv.fold(rich)
    assert foldconv.verify(rich, folded, (X, 0.5)).ok()
    assert foldconv.verify(rich, folded, {"x": X, "scale": 2.0}).ok()


def test_a_layer_that_did_not_run_is_said_so():
    net = Residual()
    net.spare = nn.Conv2d(1, 1, 3)
    rich = foldconv.expand(net, "doconv")
    report = foldconv.verify(rich, foldconv.fold(rich), X)
    assert report.uncompared == ("spare",)
    assert "not compared" in str(report)


def test_a_layer_used_twice_is_compared_twice():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    rich = foldconv.expand(nn.Sequential(conv, nn.ReLU(), conv), "doconv")
    report = foldconv.verify(rich, foldconv.fold(rich), X)
    assert [layer.name for layer in report.layers] == ["0", "0"]


def test_a_convolution_alone():
    rich = foldconv.expand(nn.Conv2d(3, 4, 3), "doconv")
    report = foldconv.verify(rich, foldconv.fold(rich), X)
    assert [layer.name for layer in report.layers] == [""]
    assert "(root)" in str(report)


def test_networks_with_other_outputs_are_refused(rich):
    with pytest.raises(
        UnsupportedError, match=r"the output of the root: expected the shape \(2, 4, 6, 6\), received \(2, 5, 6, 6\)"
    ):
        foldconv.verify(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), X)
    with pytest.raises(UnsupportedError, match="the output: expected the structure"):
        foldconv.verify(rich, rich.stem, X)
