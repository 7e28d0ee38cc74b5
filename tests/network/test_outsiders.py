"""Kinds of network that were once expanded, folded or compared wrongly without a word."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import foldconv
from foldconv.testing import randomize

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.double()

    def forward(self, x):
        if float(x.abs().max()) == 0:  # no tracer goes on here
            return x
        return self.norm(self.conv(x))


class ByProperty(Net):
    @property
    def kernel(self):
        return self.conv.weight

    def forward(self, x):
        return super().forward(x) + F.conv2d(x, self.kernel, padding=1) if float(x.max()) > -9 else x


class Inherited(ByProperty):
    def forward(self, x):
        return super().forward(x) * 1.0


class ByKeyword(Net):
    def forward(self, x):
        return super().forward(x) + weight_of(x, module=self.conv)


class ByItself(Net):
    def forward(self, x):
        return super().forward(x) + conv_of(self).weight.sum()


class ByAFunction(Net):
    def forward(self, x):
        return super().forward(x) + decay(self)


class ByAnObject(Net):
    def forward(self, x):
        return super().forward(x) + Decay(self)()


class BesideAnObject(Net):
    def forward(self, x):
        return self.loss(x) if isinstance(x, dict) else super().forward(x)

    def loss(self, batch):
        return Criterion(self)(batch)


class Decay:
    def __init__(self, net):
        self.net = net

    def __call__(self):
        return sum(p.square().sum() for p in self.net.parameters())


class Criterion:
    def __init__(self, net):
        self.device = next(net.parameters()).device
        self.net = net

    def __call__(self, batch):
        return self.net(batch["x"].to(self.device)).sum()


def decay(net):
    return net.conv.weight.square().sum()


def weight_of(x, module):
    return module.weight.sum()


def conv_of(net):
    return net.conv


@pytest.mark.parametrize("cls", [ByProperty, Inherited, ByKeyword, ByItself, ByAFunction, ByAnObject])
def test_a_weight_that_untraceable_code_reads_is_left(cls):
    with pytest.raises(foldconv.NoMatchError, match="reads its"):
        foldconv.expand(cls(), "doconv")


def test_an_object_that_asks_for_no_weight_may_have_the_model():
    assert isinstance(foldconv.expand(BesideAnObject(), "doconv").conv, foldconv.DOConv2d)


def test_a_weight_that_is_read_in_training_mode_is_left():
    class InTraining(Net):
        def forward(self, x):
            y = self.norm(self.conv(x))
            return y + F.conv2d(x, self.conv.weight, padding=1) if self.training else y

    with pytest.raises(foldconv.NoMatchError, match="reads its"):
        foldconv.expand(InTraining(), "doconv")


def test_a_run_also_asks_for_what_a_flag_gives():
    class Flagged(Net):
        def forward(self, x, raw=False):
            if float(x.abs().max()) == 0:
                return x
            y = self.conv(x)
            return [y, self.norm(y)] if raw else self.norm(y)

    with pytest.raises(foldconv.NoMatchError, match="output"):
        foldconv.expand(Flagged(), "repvgg", example_inputs=X)
    assert isinstance(foldconv.fold(Flagged(), batchnorm=True, example_inputs=X).norm, nn.BatchNorm2d)


def test_a_batch_of_one_is_enough_where_norms_stay_as_they_are():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)).double()
    assert type(foldconv.expand(net, "doconv", example_inputs=X[:1])[0]) is foldconv.DOConv2d
    with pytest.raises(foldconv.UnsupportedError, match="batches of at least two"):
        foldconv.expand(net, "repvgg", example_inputs=X[:1])


@pytest.mark.parametrize("method", ["repvgg", "acnet", "qarepvgg", "mobileone"])
def test_pruned_norms_of_branches_are_baked_in(method):
    torch.manual_seed(0)
    rich = foldconv.expand(nn.Sequential(*list(Net().children())), method)
    randomize(rich)
    for norm in [m for m in rich.modules() if isinstance(m, nn.BatchNorm2d)]:
        prune.l1_unstructured(norm, "weight", 1)
        prune.l1_unstructured(norm, "bias", 1)
    rich.eval()(X)
    plain = foldconv.fold(rich)
    torch.testing.assert_close(plain(X), rich(X), rtol=1e-10, atol=1e-10)
    assert plain.state_dict().keys() == nn.Sequential(*list(Net().children())).state_dict().keys()


def test_comparing_tensors_without_numbers_is_refused():
    class Detector(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            boxes = x.flatten(1) * self.factor
            return [{"boxes": boxes[boxes[:, 0] > 1e6]}]

    with pytest.raises(foldconv.UnsupportedError, match="nothing to compare"):
        foldconv.verify(Detector(1.0), Detector(5.0), X)


def test_frozen_norms_with_an_activation_are_taken_in():
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), layers.FrozenBatchNormAct2d(3)).double()
    randomize(net)
    net[1].running_var.uniform_(0.5, 2)
    rich = foldconv.expand(copy.deepcopy(net), "repvgg")
    torch.testing.assert_close(rich.eval()(X), net.eval()(X), rtol=1e-10, atol=1e-10)
    before = {key: value.clone() for key, value in rich.state_dict().items() if "main.norm" in key}
    rich.train()(X)
    assert before
    assert all(torch.equal(value, rich.state_dict()[key]) for key, value in before.items())
    plain = foldconv.fold(rich.eval())
    torch.testing.assert_close(plain(X), rich(X), rtol=1e-10, atol=1e-10)


SEEN = []


def see(module, inputs, output):
    SEEN.append(output)


class Capturing(nn.Module):
    """As transformers' models do: at the first forward it hooks its parts, and takes from then on what they saw."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        if not getattr(self, "_output_capturing_hooks_installed", False):
            self.norm.register_forward_hook(see)
            self._output_capturing_hooks_installed = True
        SEEN.clear()
        self.norm(self.conv(x))
        return SEEN.pop()


def test_a_model_that_hooks_itself_at_its_first_forward():
    net, x = Capturing().eval(), torch.randn(2, 3, 6, 6)
    for _ in range(2):
        assert foldconv.plan(net, "repvgg", example_inputs=x).taken == ["conv"]
        net(x)
