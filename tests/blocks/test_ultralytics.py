"""ultralytics' blocks fold into what its own ``fuse()`` leaves: stand-ins of the same class names and attributes."""

import copy

import pytest
import torch
from torch import nn

import foldconv
from foldconv.algebra.norms import is_norm
from foldconv.testing import randomize


class Conv(nn.Module):
    def __init__(self, i, o, k=1, s=1, g=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False)
        self.bn, self.act = nn.BatchNorm2d(o), nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class DWConv(Conv):
    def __init__(self, i, o, k=3):
        super().__init__(i, o, k, g=i)


class Conv2(Conv):
    def __init__(self, i, o, k=3):
        super().__init__(i, o, k)
        self.cv2 = nn.Conv2d(i, o, 1, bias=False)

    def forward(self, x):
        return self.act(self.bn(self.conv(x) + self.cv2(x)))


class ConvTranspose(nn.Module):
    def __init__(self, i, o, bn=True):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(i, o, 2, 2, bias=not bn)
        self.bn, self.act = nn.BatchNorm2d(o) if bn else nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv_transpose(x)))

    def forward_fuse(self, x):
        return self.act(self.conv_transpose(x))


class RepConv(nn.Module):
    def __init__(self, i, o, s=1, bn=False):
        super().__init__()
        self.act, self.bn = nn.SiLU(), nn.BatchNorm2d(i) if bn else None
        self.conv1, self.conv2 = Conv(i, o, 3, s, act=False), Conv(i, o, 1, s, act=False)

    def forward(self, x):
        return self.act(self.conv1(x) + self.conv2(x) + (0 if self.bn is None else self.bn(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class RepVGGDW(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.conv1 = (
            Conv(channels, channels, 7, g=channels, act=False),
            Conv(channels, channels, 3, g=channels, act=False),
        )
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.conv(x) + self.conv1(x))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    for cls in (Conv, DWConv, Conv2, ConvTranspose, RepConv):
        monkeypatch.setattr(cls, "__module__", "ultralytics.nn.modules.conv")
    monkeypatch.setattr(RepVGGDW, "__module__", "ultralytics.nn.modules.block")


def network():
    model = nn.Sequential(
        Conv(3, 4, 3, 2),
        RepConv(4, 4, bn=True),
        RepConv(4, 6),
        RepVGGDW(6),
        Conv2(6, 6),
        ConvTranspose(6, 6),
        DWConv(6, 6),
    )
    model[0].i, model[0].f = 0, -1  # as its parser attaches them
    randomize(model)
    return model.double().eval()


X = torch.randn(2, 3, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NAMES = ("0.conv", "1.conv", "2.conv", "3.conv", "4.conv", "5.conv_transpose", "6.conv")


def test_fused_as_its_own_fuse_does_it():
    model = network()
    expected = model(X)
    folded = foldconv.fold(model, blocks=True)
    assert set(folded.state_dict()) == {f"{name}.{part}" for name in NAMES for part in ("weight", "bias")}
    assert (folded(X) - expected).abs().max() <= 1e-12 * expected.abs().max()
    # What its own code asks: is there a norm, and is there another branch?
    assert not any(hasattr(block, name) for block in folded for name in ("bn", "conv1", "cv2"))
    assert all(block.forward == block.forward_fuse for block in folded)
    assert (folded[0].i, folded[0].f) == (0, -1)
    moved = copy.deepcopy(foldconv.fold(folded, blocks=True))
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.zero_()
    assert moved(X).abs().max() == 0
    assert torch.equal(folded(X), foldconv.fold(model)(X))


def test_expanded_it_folds_back_or_all_the_way():
    model = network()
    rich = foldconv.expand(model, "repvgg")
    with torch.no_grad():
        for parameter in rich.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, dtype=torch.float64)
    expected = rich(X)
    assert foldconv.fold(rich).state_dict().keys() == model.state_dict().keys()
    folded = foldconv.fold(rich, batchnorm=True)
    assert not [module for module in folded.modules() if is_norm(module)]
    assert (folded(X) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_a_transposed_convolution_without_a_norm_has_nothing_to_fold():
    block = nn.Sequential(ConvTranspose(4, 2, bn=False)).double()
    assert "forward" not in vars(foldconv.fold(block, blocks=True)[0])
