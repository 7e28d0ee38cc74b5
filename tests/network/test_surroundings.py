"""Looking at a model leaves what its forward writes elsewhere as it was: generators, classes, others' tensors."""

import collections
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from foldconv.network.dataflow import DataFlow

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
BANK = torch.zeros(2, 2)
MEAN, VAR = torch.zeros(3), torch.ones(3)


class Base(nn.Module):
    kept = (torch.zeros(3), collections.deque([[0]]))


class Busy(Base):
    """Writes wherever a forward can; `traced` says whether stand-ins can follow it."""

    count, last, log = 0, None, {"calls": [], "seen": {1}}
    total = torch.zeros(3)

    def __init__(self, traced):
        super().__init__()
        self.conv, self.norm, self.traced = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), traced

    def forward(self, x):
        if not self.traced and float(x.sum()) > 1e9:
            return x
        type(self).count += 1
        type(self).last = type(self).new = x
        self.log["calls"].append(x)
        self.log[len(self.log)] = x
        self.log["seen"].clear()
        self.kept[1][0].append(x)
        self.total.add_(random.random() + np.random.rand() + torch.rand(()))
        self.kept[0].fill_(7)
        BANK[1].mul_(0).sub_(1)
        torch.add(BANK, 1, out=BANK)
        F.batch_norm(torch.randn(4, 3), MEAN, VAR, training=True)
        return self.norm(self.conv(x))


def state():
    tensors = [*(t.tolist() for t in (BANK, MEAN, VAR, Busy.total, Busy.kept[0]))]
    return tensors, Busy.count, Busy.last, hasattr(Busy, "new"), repr(Busy.log), repr(Busy.kept[1])


def test_everything_is_put_back():
    for traced in (True, False):
        net, before = Busy(traced), state()
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        log = Busy.log
        flow = DataFlow(net, X, training=True)
        assert flow.why(net.conv) == "norm alone reads its output"
        assert (len(flow.traces) == 0) is not traced
        assert state() == before
        assert Busy.log is log
        assert generators == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    net(X)
    assert state() != before, "the forward does write all that"


def test_after_a_failure_too():
    class Failing(Busy):
        def forward(self, x):
            super().forward(x)
            raise KeyError("always")

    before = state()
    DataFlow(Failing(True), training=True)
    assert state() == before
