"""A network as a whole: what no check of single layers shows is refused where example inputs are known."""

import logging

import pytest
import torch
from torch import Tensor, nn

import foldconv
from foldconv.network._whole import whole_difference

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor):
        return self.norm(self.conv(x))


class CountsParameters(Net):
    """As networks do that divide a penalty, or scale their output, by their size."""

    def forward(self, x: Tensor):
        y = super().forward(x)
        return {"y": y, "scaled": y * sum(p.numel() for p in self.parameters())}


class CountsModules(Net):
    def forward(self, x: Tensor):
        return super().forward(x) * len(list(self.modules()))


class Draws(CountsParameters):
    """Gives other values each time, so nothing can be told."""

    calls = 0

    def forward(self, x: Tensor):
        self.calls += 1
        return super().forward(x)["scaled"] * self.calls


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("cls", "method", "where"),
    [
        (CountsParameters, "doconv", "['scaled']"),
        (CountsParameters, "repvgg", "['scaled']"),
        (CountsModules, "acnet", ""),
    ],
)
def test_a_network_that_gives_another_output_is_refused(cls: type[Net], method: str, where: str, inplace: bool):
    net = cls()
    before = state_of(net)
    with pytest.raises(foldconv.UnsupportedError) as raised:
        foldconv.expand(net, method, example_inputs=X, inplace=inplace)
    assert str(raised.value).startswith(f"example_inputs: the expanded {cls.__name__} gives another output{where}:")
    assert "\n" not in str(raised.value)
    assert type(net.conv) is nn.Conv2d
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())

    rich = foldconv.expand(net, method)
    kinds = [type(module) for module in rich.modules()]
    with pytest.raises(foldconv.FoldMismatchError) as raised:
        foldconv.fold(rich, example_inputs=X, inplace=inplace)
    assert str(raised.value).startswith(f"example_inputs: the folded {cls.__name__} gives another output{where}:")
    assert [type(module) for module in rich.modules()] == kinds


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", ["doconv", "expandnet", "repvgg"])
def test_a_network_that_gives_the_same_is_taken(method: str, inplace: bool):
    net = Net()
    rich = foldconv.expand(net, method, example_inputs=X, inplace=inplace)
    assert (rich is net) == inplace
    plain = foldconv.fold(rich, batchnorm=True, example_inputs=X, inplace=inplace)
    assert (plain is net) == inplace
    assert type(plain.norm) is nn.Identity


def test_init_paper_is_not_compared():
    assert foldconv.expand(CountsParameters(), "doconv", init="paper", example_inputs=X) is not None


def test_what_cannot_be_compared_is_said(caplog: pytest.LogCaptureFixture):
    class Single(CountsParameters):
        def forward(self, x: Tensor):
            return super().forward(x.to(torch.float32))

    net = Single()
    with caplog.at_level(logging.INFO, logger="foldconv"):
        foldconv.expand(net, "doconv", example_inputs=X)
    assert "Single was not compared as a whole (" in caplog.text


def test_other_values_each_time_and_narrow_types_tell_nothing():
    for net, x in ((Draws(), X), (CountsParameters().bfloat16(), X.bfloat16())):
        assert whole_difference(net.eval(), foldconv.expand(net, "doconv"), x) is None


def test_ranks_may_turn_over_but_shapes_may_not():
    class Picks(Net):
        def forward(self, x: Tensor):
            y = super().forward(x)
            count = sum(1 for _ in self.parameters())
            return y, torch.tensor(count), torch.zeros(count)

    net = Picks()
    found = whole_difference(net, foldconv.expand(net, "doconv"), X)
    assert found == "[2]: expected the shape (3,), received (4,)"


def test_nothing_outside_is_touched():
    net, states = CountsModules(), torch.get_rng_state()
    assert whole_difference(net, net, X) is None
    assert torch.equal(torch.get_rng_state(), states)
    assert net.training
