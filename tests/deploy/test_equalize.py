import copy
import logging

import pytest
import torch
from torch import nn

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.layers.permuted import PermutedConv2d

X = torch.randn(2, 4)

CONVS = {
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 3, groups=4)),
    "depthwise": (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8, bias=False)),
    "transposed": (nn.ConvTranspose2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 3, groups=4, stride=2)),
    "permuted": (
        PermutedConv2d(4, 8, 3, groups=2, output_order=[3, 1, 7, 0, 2, 6, 4, 5]),
        PermutedConv2d(8, 4, 3, groups=4, input_order=[5, 6, 2, 0, 7, 1, 4, 3]),
    ),
    "linear": (nn.Linear(4, 8), nn.Linear(8, 4)),
    "one dimension": (nn.Conv1d(4, 8, 3, padding=1, padding_mode="reflect"), nn.Conv1d(8, 4, 3, dilation=2)),
}


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("between", [nn.ReLU(), nn.PReLU(8), nn.Sequential(nn.LeakyReLU(), nn.Identity())], ids=str)
def test_the_function_stays_and_the_ranges_become_alike(kind, between):
    first, second = copy.deepcopy(CONVS[kind])
    net = nn.Sequential(first, copy.deepcopy(between), second).double()
    with torch.no_grad():
        first.weight.view(8, -1)[0].mul_(100)
        for value in net.parameters():  # weights that came from elsewhere do not lie in torch's order
            value.data = value.data.transpose(0, -1).contiguous().transpose(0, -1)
    x = torch.randn(2, *((4, 9, 9)[: first.weight.dim() - 1] if kind != "linear" else (4,)), dtype=torch.float64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    even = foldconv.equalize(net)
    expected, received = net(x), even(x)
    assert (received - expected).abs().max() < 1e-10 * expected.abs().max()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    changed = even[0].weight / net[0].weight
    assert changed.max() / changed.min() > 5
    again = foldconv.equalize(even)
    assert torch.allclose(again[0].weight, even[0].weight, rtol=1e-2)


def test_what_is_clipped_stays_and_is_told(caplog):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 2))
    with caplog.at_level(logging.WARNING):
        even = foldconv.equalize(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), even.parameters()))
    assert "1 layers keep their ranges: 0" in caplog.text
    assert "ReLU6" in caplog.text


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(self.first(self.first(x).relu()).relu())


class Read(Twice):
    def forward(self, x):
        y = self.first(x).relu()
        return self.second(y), y


class Squared(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight**2, self.bias)


class Plus(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("kind", "odd", "x"),
    [(lambda: nn.Conv2d(4, 4, 1), Squared(4, 4, 1), torch.randn(2, 4, 3, 3)), (lambda: nn.Linear(4, 4), Plus(4, 4), X)],
    ids=["weight", "output"],
)
def test_subclasses_that_compute_something_else_are_left(kind, odd, x):
    """As timm's convolutions that standardize their weight."""
    net = nn.Sequential(kind(), nn.ReLU(), odd, nn.ReLU(), kind(), nn.ReLU(), kind()).double()
    even = foldconv.equalize(net)
    assert (even(x.double()) - net(x.double())).abs().max() < 1e-10
    assert [torch.equal(even[i].weight, net[i].weight) for i in (0, 2, 4, 6)] == [True, True, False, False]


def test_refused_or_left():
    with pytest.raises(UnsupportedError, match="first: is called 2 times"):
        foldconv.equalize(Twice())
    with pytest.raises(UnsupportedError, match="0: a foldable layer; fold the network first"):
        foldconv.equalize(foldconv.expand(nn.Sequential(nn.Conv2d(1, 2, 3)), "doconv"))
    net = Read()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), foldconv.equalize(net).parameters()))
