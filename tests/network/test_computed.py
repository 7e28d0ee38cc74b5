"""Weights that torch's utilities compute are folded as evaluation mode uses them: pruned, normalized, parametrized."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import foldconv
from foldconv.layers import Foldable
from foldconv.network.tree import copy_of

X = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Noisy(nn.Module):
    """Something else while training, as quantization-aware training is."""

    def forward(self, weight):
        return weight + torch.rand_like(weight) if self.training else weight * 3


def pruned_twice(conv):
    prune.l1_unstructured(conv, "weight", 0.3)
    prune.ln_structured(conv, "weight", 0.25, n=2, dim=0)
    if conv.bias is not None:
        prune.random_unstructured(conv, "bias", 0.5)


def quietly(utility):
    def use(conv):
        with pytest.warns(FutureWarning):
            utility(conv)

    return use


UTILITIES = {
    "pruning": lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    "pruned twice, and its bias": pruned_twice,
    "weight_norm by a hook": quietly(nn.utils.weight_norm),
    "spectral_norm by a hook": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "two parametrizations": lambda conv: [parametrize.register_parametrization(conv, "weight", Halved()) for _ in "12"],
    "noise in training": lambda conv: parametrize.register_parametrization(conv, "weight", Noisy()),
}


def stirred(net):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean += 0.5
    return net


def network():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).double()


def used(net, utility):
    """The utility on every convolution of the first layer, and three steps of training."""
    for conv in [m for m in net[0].modules() if isinstance(m, nn.Conv2d)][:2]:
        utility(conv)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        net(X).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    return net


@pytest.mark.parametrize("kind", UTILITIES)
def test_computed_weights_are_baked_in(kind, tmp_path):
    for method in ("doconv", "repvgg", None):
        net = stirred(network() if method is None else foldconv.expand(network(), method))
        net = used(net, UTILITIES[kind])
        keys = list(net.state_dict())
        for inplace, batchnorm in ((False, False), (False, True), (True, True)):
            if method is None and not batchnorm:
                continue
            net.train()(X)  # its weights are computed with gradients now, which torch's own copies refuse
            work, expected = copy_of(net) if inplace else net, copy_of(net).eval()(X)
            plain = foldconv.fold(work, batchnorm=batchnorm, inplace=inplace)
            assert [type(m) for m in plain] == [nn.Conv2d, nn.Identity if batchnorm else nn.BatchNorm2d, nn.ReLU]
            assert plain.training
            assert list(plain[0].state_dict()) == ["weight", "bias"]
            assert not plain[0]._forward_pre_hooks
            assert not plain[0]._state_dict_hooks
            assert all(p.requires_grad for p in plain.parameters())
            plain.eval()
            assert torch.allclose(plain(X), expected, rtol=1e-12, atol=1e-12)
            again = copy.deepcopy(plain)
            again.train()(X).sum().backward()
            assert again[0].weight.grad.abs().max() > 0
            foldconv.save(plain, tmp_path / "plain.safetensors")
            if not inplace:
                assert list(net.state_dict()) == keys
                net.train()(X).sum().backward()  # the original goes on, its utility too


def test_float32_is_composed_in_float64_too():
    rich = stirred(foldconv.expand(network(), "doconv")).float()
    parametrizations.weight_norm(rich[0])
    plain = foldconv.fold(rich)
    exact = copy.deepcopy(rich).double()
    assert torch.equal(plain[0].weight, foldconv.fold(exact)[0].weight.float())


def test_other_parameters_than_weight():
    rich = stirred(foldconv.expand(network(), "doconv"))
    parametrize.register_parametrization(rich[0], "D", Halved())
    expected = rich.eval()(X)
    assert torch.allclose(foldconv.fold(rich)(X), expected)


def test_a_plain_convolution_that_is_not_folded_stays_as_it_is():
    net = network()
    prune.l1_unstructured(net[0], "weight", 0.5)
    parametrizations.weight_norm(net.append(nn.Conv2d(4, 2, 1).double())[3])
    folded = foldconv.fold(net, batchnorm=True)
    assert list(folded[0].state_dict()) == ["weight", "bias"]
    assert parametrize.is_parametrized(folded[3])
    assert list(foldconv.fold(net).state_dict()) == list(net.state_dict())


def test_a_weight_that_somebody_else_computes():
    rich = stirred(foldconv.expand(network(), "doconv")).eval()
    hidden = rich[0].weight.detach() * 2
    del rich[0].weight
    rich[0].weight = hidden
    expected = rich(X)
    assert torch.allclose(foldconv.fold(rich)(X), expected)  # as it is, with nobody to change it

    def generate(module, args):
        module.weight = hidden * module.factor

    rich[0].factor = 3.0
    rich[0].register_forward_pre_hook(generate)
    with pytest.raises(foldconv.UnsupportedError, match=r"^0: its weight is no parameter .*hook .*generate; remove"):
        foldconv.fold(rich)
    assert isinstance(rich[0], Foldable)


def test_user_hooks_survive_beside_the_utility():
    rich, seen = stirred(foldconv.expand(network(), "doconv")), []
    rich[0].register_forward_pre_hook(lambda module, args: seen.append(type(module)))
    prune.l1_unstructured(rich[0], "weight", 0.5)
    plain = foldconv.fold(rich)
    assert seen == []
    plain(X)
    assert seen == [nn.Conv2d]
