"""Hooks of the users' that read or write weights, which no look at a forward runs."""

import functools
from typing import Any

import pytest
import torch
from torch import nn

import foldconv
from foldconv.network._hooks import read_by_hooks

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A pair whose convolution and root can be hooked."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.double()

    def forward(self, x):
        return self.norm(self.conv(x))

    def add_all(self, module, inputs, output):
        return output + self.decay()

    def decay(self):
        return sum(p.square().sum() for p in self.parameters())


class Adds:
    def __call__(self, module, inputs, output):
        return output + module.weight.sum()


def standardize(module, inputs):
    with torch.no_grad():
        module.weight.sub_(module.weight.mean((1, 2, 3), keepdim=True))


def decay_of(module):
    return module.conv.weight.sum()


def add(factor, module, inputs, output):
    return output + factor * decay_of(module)


def adds(read):
    def hook(module, inputs, output):
        return output + read(module)

    return hook


def by_name(module, inputs, output):
    return output + getattr(module, "weight").mean()  # noqa: B009


def shapes(module, inputs, output):
    if module.bias is not None or module.weight.dtype != output.dtype or module.weight.size(0) != output.shape[1]:
        raise ValueError(module.weight.shape, module.bias is None)


READING = {
    "of the root": lambda net: net.register_forward_hook(lambda m, args, y: y + m.conv.weight.sum()),
    "before the root": lambda net: net.register_forward_pre_hook(lambda m, args: args[0] * m.conv.weight.mean()),
    "of the layer": lambda net: net.conv.register_forward_hook(Adds()),
    "before the layer": lambda net: net.conv.register_forward_pre_hook(standardize),
    "a method": lambda net: net.conv.register_forward_hook(net.add_all),
    "partial": lambda net: net.register_forward_hook(functools.partial(add, 2)),
    "closure": lambda net: net.register_forward_hook(adds(decay_of)),
    "comprehension": lambda net: net.register_forward_hook(lambda m, a, y: y + sum([p.sum() for p in m.parameters()])),
    "name": lambda net: net.conv.register_forward_hook(by_name),
}


@pytest.mark.parametrize("how", READING)
@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_what_a_hook_reads_stays(how, method):
    net = Net().eval()
    READING[how](net)
    with pytest.raises(foldconv.NoMatchError, match="reads its"):
        foldconv.expand(net, method, example_inputs=X)
    for inputs in (None, X):
        assert isinstance(foldconv.fold(net, batchnorm=True, example_inputs=inputs).norm, nn.BatchNorm2d)


def test_other_hooks_read_nothing():
    seen = []
    net = Net()
    net.conv.register_forward_hook(shapes)
    net.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net.register_forward_hook(functools.partial(print, "ran"))
    nn.utils.spectral_norm(net.conv)
    watch = adds(decay_of)
    watch.__module__ = "wandb.integration.torch.wandb_torch"
    net.register_forward_hook(watch)
    assert not read_by_hooks(net)
    assert not read_by_hooks(net.conv)


@pytest.mark.parametrize("method", ["doconv", "repvgg"])
@pytest.mark.parametrize("where", ["conv", ""])
def test_hooks_that_come_later_are_refused_by_fold(method: str, where: str):
    rich = foldconv.expand(Net(), method)
    hook: Any = Adds() if where else rich.add_all
    handle = rich.get_submodule(where).register_forward_hook(hook)
    with pytest.raises(foldconv.UnsupportedError, match=r"^conv: a hook reads its weight, .*; remove it before$"):
        foldconv.fold(rich)
    handle.remove()
    rich.eval()
    assert foldconv.verify(rich, foldconv.fold(rich), X).max_error < 1e-12
