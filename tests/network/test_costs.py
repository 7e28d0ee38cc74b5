"""`summary` counts what is there; a plain loop is the oracle."""

import pytest
import torch
from torch import nn

import foldconv
from foldconv.testing import randomize


def by_name(summary):
    return {row.name: row for row in summary.rows}


def test_counts_of_each_kind_of_layer():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, (3, 5), groups=4, padding=(1, 2)),
        nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 64, 10),
    )
    rich = foldconv.expand(net, foldconv.DOConv(depth_multiplier=15))
    found = foldconv.summary(rich, (2, 3, 8, 8))
    rows = by_name(found)
    macs = {
        "0": 2 * 8 * 4 * 4 * 3 * 9,
        "2": 2 * 8 * 4 * 4 * 2 * 15,
        "3": 2 * 8 * 4 * 4 * 2 * 4,
        "4": 2 * 4 * 8 * 8 * 4,
        "6": 2 * 256 * 10,
    }
    composition = {"0": 8 * 3 * 9 * 15, "2": 8 * 2 * 15 * 15, "3": 8 * 2 * 4 * 15, "4": 0, "6": 0}
    for name, folded in macs.items():
        assert rows[name].macs_folded == folded
        assert rows[name].macs_training == folded + composition[name]
        assert rows[name].parameters_folded == sum(p.numel() for p in net[int(name)].parameters())
        assert rows[name].parameters_training == sum(p.numel() for p in rich[int(name)].parameters())
        assert rows[name].method == ("doconv" if composition[name] else "")
    assert found.parameters_training == sum(p.numel() for p in rich.parameters())
    assert found.parameters_folded == sum(p.numel() for p in net.parameters())
    assert found.macs_folded == sum(macs.values())
    assert found.macs_training == sum(macs.values()) + sum(composition.values())
    assert found.input_shape == (2, 3, 8, 8)


def test_it_agrees_with_the_folded_network_and_torchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, stride=2), nn.Conv2d(4, 2, 1)
    )
    rich = foldconv.expand(net, "doconv")
    folded = foldconv.fold(rich)
    x = torch.zeros(1, 3, 9, 9)
    with FlopCounterMode(display=False) as counter:
        folded(x)
    assert foldconv.summary(rich, x).macs_folded == counter.get_total_flops() // 2
    assert foldconv.summary(folded, x).macs_training == counter.get_total_flops() // 2


def test_the_model_is_left_as_it_was():
    rich = foldconv.expand(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "doconv").train()
    randomize(rich)
    before = {key: value.clone() for key, value in rich.state_dict().items()}
    foldconv.summary(rich, (2, 1, 8, 8))
    assert rich.training
    assert not any(m._forward_hooks for m in rich.modules())
    assert all(torch.equal(value, rich.state_dict()[key]) for key, value in before.items())


def test_a_shape_is_guessed_and_an_unfitting_guess_says_so():
    assert foldconv.summary(nn.Conv2d(3, 4, 3)).input_shape == (1, 3, 224, 224)
    fixed = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3))
    found = foldconv.summary(fixed)
    assert found.macs_folded is None
    assert "multiply-adds unknown: pass inputs=" in str(found)
    assert "?" in str(found)


def test_a_given_shape_has_to_fit():
    with pytest.raises(RuntimeError, match="channels"):
        foldconv.summary(nn.Conv2d(3, 4, 3), (1, 2, 8, 8))


def test_shared_and_idle_layers_and_a_network_without_any():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    shared = foldconv.summary(nn.Sequential(conv, conv), (1, 2, 4, 4))
    assert [(row.name, row.macs_folded) for row in shared.rows] == [("0", 2 * 16 * 2 * 2 * 9)]
    net = nn.Sequential(nn.Conv2d(2, 2, 1))
    net.spare = nn.Conv2d(2, 2, 1)
    net.forward = lambda x: x
    assert by_name(foldconv.summary(net, (1, 2, 4, 4)))["spare"].macs_folded is None
    assert foldconv.summary(nn.ReLU()).rows == ()


def test_what_is_left_is_told():
    net = nn.Sequential(*(nn.Conv2d(2, 2, 3) for _ in range(7)), nn.Conv2d(2, 2, 1))
    found = foldconv.summary(net, (1, 2, 20, 20))
    assert len(found.left) == 8
    assert str(found).endswith(
        "\n8 of 8 convolutions are left as they are: 0, 1, 2, 3, 4 and 3 more; foldconv.plan says why"
    )
    found = foldconv.summary(foldconv.expand(net, "doconv"), (1, 2, 20, 20))
    assert str(found).endswith("\n1 of 8 convolutions are left as they are: 7; foldconv.plan says why")
    assert "left" not in str(foldconv.summary(foldconv.expand(net[:7], "doconv"), (1, 2, 20, 20)))
