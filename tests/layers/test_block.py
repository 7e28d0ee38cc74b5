"""A user's own block: folds, counts, saves; what has no exact kernel is refused at once."""

import pytest
import torch
from torch import nn

import foldconv
from foldconv import UnsupportedError
from foldconv.algebra import Scale, Sum
from foldconv.testing import randomize


def network():
    branch = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6))
    block = foldconv.FoldableBlock(Sum(branch, nn.Conv2d(4, 6, 1, stride=2)))
    net = nn.Sequential(block, nn.ReLU(), foldconv.FoldableBlock(Scale(6), ndim=2)).double().eval()
    randomize(net)
    return net


X = torch.randn(2, 4, 8, 9, dtype=torch.float64)


def test_it_folds():
    net = network()
    folded = foldconv.fold(net)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    torch.testing.assert_close(folded(X), net(X), rtol=1e-10, atol=1e-10)
    assert foldconv.verify(net, folded, X).ok(1e-10)


def test_it_counts_and_saves(tmp_path):
    net = network()
    row = foldconv.summary(net, (1, 4, 8, 8)).rows[0]
    assert (row.method, row.macs_training, row.macs_folded) == ("", 16 * 6 * 4 * 10, 16 * 6 * 4 * 9)
    foldconv.save(net, tmp_path / "net.safetensors")
    loaded = foldconv.load(tmp_path / "net.safetensors", network()).eval()
    torch.testing.assert_close(loaded(X), net(X), rtol=0, atol=0)


def test_expansion_leaves_it_alone():
    net = network().append(nn.Conv2d(6, 6, 3).double())
    rich = foldconv.expand(net, "doconv")
    assert [type(m).__name__ for m in rich] == ["FoldableBlock", "ReLU", "FoldableBlock", "DOConv2d"]


def test_what_has_no_kernel_is_refused_at_once():
    with pytest.raises(UnsupportedError, match=r"1: no rule gives a kernel for .*ReLU"):
        foldconv.FoldableBlock(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))
    body = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1))
    with pytest.raises(UnsupportedError, match=r"2: a layer with a bias .or norm. followed by zero padding"):
        foldconv.FoldableBlock(body)
