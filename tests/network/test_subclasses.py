"""Subclasses of convolutions: those that only say how they are made are convolutions, others stay with the reason."""

import abc

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

import foldconv
from foldconv.algebra.norms import is_norm
from foldconv.network._subclasses import as_plain, is_plain, why_not

F64 = {"dtype": torch.float64}


class Own(nn.Conv2d):
    """Its constructor, what it looks like, and a helper for who builds it."""

    expansion = 4

    def __init__(self, channels, out):
        super().__init__(channels, out, 3, padding=1, bias=False)
        self.note = "hers"

    def extra_repr(self):
        return "own"

    def reset_parameters(self):
        nn.init.normal_(self.weight, 0, 0.1)

    @staticmethod
    def stride_of(stride):
        return stride, stride


class Deeper(Own, abc.ABC):
    pass


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return F.conv2d(x, weight - weight.mean(), bias)


class OwnMethod(nn.Conv2d):
    def scaled(self, x):
        return self(x) * 2


class OwnWeight(nn.Conv2d):
    @property
    def weight(self):
        return self._parameters["weight"] * 2


class OwnCall(OwnMethod):
    def __call__(self, x):
        return x


class FromMixin(OwnMethod, Own):
    pass


def test_which_are_convolutions():
    for conv in (Own(3, 4), Deeper(3, 4), Conv3DSimple(3, 4), Conv3DNoTemporal(3, 4), nn.Conv1d(1, 1, 1)):
        assert is_plain(conv)
        assert why_not(conv) is None
    for cls, what in {
        OwnForward: "forward",
        OwnConvForward: "_conv_forward",
        OwnMethod: "scaled",
        OwnWeight: "weight",
        OwnCall: "__call__, scaled",
    }.items():
        conv = cls.__new__(cls)
        assert not is_plain(conv)
        expected = f"{__name__}.{cls.__name__} is a subclass with its own {what}, so it may compute another function"
        assert why_not(conv) == expected
    assert not is_plain(FromMixin.__new__(FromMixin))
    assert not is_plain(foldconv.DOConv2d(3, 4, 3))


@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_expanded_saved_and_folded(method, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(Own(3, 4), nn.BatchNorm2d(4), nn.ReLU(), Deeper(4, 4), nn.BatchNorm2d(4)).double()
    x = torch.randn(2, 3, 6, 6, **F64)
    net(x)
    rich = foldconv.expand(net, method)
    torch.testing.assert_close(rich(x), net(x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        for parameter in rich.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rich.eval()
    foldconv.save(rich, tmp_path / "rich.safetensors")
    again = foldconv.load(tmp_path / "rich.safetensors", net).eval()
    torch.testing.assert_close(again(x), rich(x), rtol=0, atol=0)
    plain = foldconv.fold(rich)
    assert (type(plain[0]), plain[0].note) == (nn.Conv2d, "hers")
    assert plain.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(plain(x), rich(x), rtol=1e-10, atol=1e-10)
    bare = foldconv.fold(net, batchnorm=True)
    assert not any(map(is_norm, bare.modules()))
    torch.testing.assert_close(bare.eval()(x), net.eval()(x), rtol=1e-10, atol=1e-10)


def test_tensorflows_padding_where_it_does_not_depend_on_the_input():
    torch.manual_seed(0)
    for size, stride, dilation in ((3, 1, 1), (2, 1, 1), (4, 1, 1), (3, 1, 2), (1, 2, 1)):
        conv = timm.layers.Conv2dSame(3, 4, size, stride=stride, dilation=dilation, bias=False)
        net = nn.Sequential(conv, nn.BatchNorm2d(4)).double().eval()
        method = "doconv" if size > 1 else None
        for n in (7, 8):
            x = torch.randn(1, 3, n, n, **F64)
            torch.testing.assert_close(as_plain(conv)(x), conv(x), rtol=1e-10, atol=1e-10)
            bare = foldconv.fold(net, batchnorm=True)
            torch.testing.assert_close(bare(x), net(x), rtol=1e-10, atol=1e-10)
            if method:
                rich = foldconv.expand(net, method)
                torch.testing.assert_close(rich(x), net(x), rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(foldconv.fold(rich)(x), net(x), rtol=1e-10, atol=1e-10)
        assert not any(map(is_norm, bare.modules()))
    assert as_plain(conv).weight is conv.weight


def test_what_stays_stays_in_a_fold_too():
    for conv in (timm.layers.Conv2dSame(3, 4, 3, stride=2), timm.layers.ScaledStdConv2d(3, 4, 3), OwnForward(3, 4, 3)):
        net = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
        folded = foldconv.fold(net, batchnorm=True)
        assert (type(folded[0]), type(folded[1])) == (type(conv), nn.BatchNorm2d)
        with pytest.raises(foldconv.NoMatchError, match=type(conv).__name__):
            foldconv.expand(net, "doconv")
