"""`plan` tells of every convolution, `expand` in one line of the log."""

import logging

import pytest
import torch
from torch import nn

import foldconv


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.point = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.bare = nn.Conv2d(4, 4, 3, bias=False)
        self.head = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.head(self.bare(self.point(self.stem(x))).relu())


def test_what_is_planned_is_done(caplog):
    net = Net()
    found = foldconv.plan(net, "repvgg")
    shift = "neither a norm that follows it alone nor a bias is there to take the branches' shift"
    assert found.taken == ["stem.0", "head"]
    assert found.left == {
        "point.0": "its kernel has one tap, which a 1×1 branch would only repeat",
        "bare": shift,
    }
    lines = str(found).splitlines()
    assert [line.partition("  ")[0] for line in lines[2:-1]] == ["stem.0", "point.0", "bare", "head"]
    assert [lines[0], lines[2], lines[-1]] == [
        "convolution  repvgg",
        "stem.0       taken, with stem.1",
        "2 of 4 convolutions of Net taken",
    ]
    assert lines[4] == f"bare         left: {shift} (its output goes to relu, no batch norm module)"
    assert not caplog.records
    rich = foldconv.expand(net, "repvgg")
    assert [n for n, m in rich.named_modules() if type(m).__name__ == "BranchedConv"] == found.taken
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("foldconv", logging.WARNING)
    assert record.getMessage() == (
        "expand: 2 of 4 convolutions of Net stay as they are (1: its kernel has one tap, which a 1×1 branch would only "
        f"repeat; 1: {shift}); print(foldconv.plan(model, 'repvgg')) tells of each"
    )


def test_arguments_are_those_of_expand(caplog):
    net = Net()
    found = foldconv.plan(net, foldconv.RepVGG(), include="stem.*", init="paper", inplace=True)
    assert found.taken == ["stem.0"]
    assert found.left == dict.fromkeys(["point.0", "bare", "head"], "it is not selected by include, exclude and where")
    foldconv.expand(net, "repvgg", include="stem.*")
    assert not caplog.records, "who chooses knows what stays"
    assert foldconv.plan(net, "doconv", where=lambda name, module: module is net.bare).taken == ["bare"]
    with pytest.raises(foldconv.NoMatchError, match="the pattern 'stemm' matches no convolution"):
        foldconv.plan(net, "doconv", exclude="stemm")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        foldconv.plan(3, "doconv")


def test_a_method_that_passes_over_single_taps_warns_nobody(caplog):
    with caplog.at_level(logging.INFO):
        foldconv.expand(Net(), "doconv")
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_nothing_taken_is_a_plan_too():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
    assert foldconv.plan(net, "repvgg").taken == []
    assert foldconv.plan(nn.ReLU(), "repvgg").rows == ()
    rich = foldconv.expand(net, "doconv")
    assert foldconv.plan(rich, "repvgg").left == {"0": "it is foldable already"}
    assert foldconv.plan(nn.Conv2d(1, 1, 3), "doconv").taken == [""]


def test_example_inputs_and_where_they_would_help():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) if float(x.sum()) < 1e9 else x

    (row,) = foldconv.plan(Asks(), "repvgg").rows
    assert row.evidence == (
        "it is called by the root (Asks), which cannot be traced; with example_inputs= the model also runs, which "
        "shows more than tracing"
    )
    (row,) = foldconv.plan(Asks(), "repvgg", example_inputs=torch.randn(2, 3, 8, 8)).rows
    assert (row.taken, row.norm) == (True, "norm")


def test_ties_are_refused_as_expand_does():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    net[0].weight = net[1].weight
    with pytest.raises(foldconv.UnsupportedError, match="0 shares its weight with 1"):
        foldconv.plan(net, "doconv", include="0")
