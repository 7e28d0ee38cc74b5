"""What holds a module gets the new one, wherever it holds it; copies lead to nothing of the model's; wrappers."""

import collections
import copy
import dataclasses
import functools
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import foldconv
from foldconv.network.tree import copy_of, evaluation, state_of, unwrapped

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Named = collections.namedtuple("Named", "conv scale")


@dataclasses.dataclass(frozen=True)
class Frozen:
    conv: Any


@dataclasses.dataclass
class Slotted:
    __slots__ = ("conv",)
    conv: Any

    def get(self):
        return self.conv


class Tuple(tuple):
    """A tuple with a constructor of its own."""

    def __new__(cls, items):
        self = super().__new__(cls, items)
        self.first = items[0]
        return self


class Dict(dict):
    pass


class Block(nn.Module):
    """A module that nobody registers."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def array(conv):
    values = np.empty(2, dtype=object)
    values[1] = conv
    return values


def function(conv):
    def call(x):
        return conv(x)

    return call


# How a convolution is held, and how it is found there.
HOLDERS = {
    "list": (lambda c: [c], lambda h: h[0]),
    "tuple": (lambda c: (1, c), lambda h: h[1]),
    "namedtuple": (lambda c: Named(c, 1), lambda h: h.conv),
    "subclass of tuple": (lambda c: Tuple((c, 1)), lambda h: h.first),
    "set": (lambda c: {c}, lambda h: next(iter(h))),
    "frozenset": (lambda c: frozenset({c}), lambda h: next(iter(h))),
    "deque": (lambda c: collections.deque([c], maxlen=2), lambda h: h[0]),
    "dict": (lambda c: {"a": c}, lambda h: h["a"]),
    "key": (lambda c: {0: 1, c: 2, 3: 4}, lambda h: list(h)[1]),
    "key in a tuple": (lambda c: Dict({("a", c): 1}), lambda h: next(iter(h))[1]),
    "ordered key": (lambda c: collections.OrderedDict([(c, 1), (2, 3)]), lambda h: next(iter(h))),
    "counter": (lambda c: collections.Counter([c]), lambda h: next(iter(h))),
    "partial": (lambda c: functools.partial(c), lambda h: h.func),
    "argument of a partial": (lambda c: functools.partial(max, 1, key=c), lambda h: h.keywords["key"]),
    "frozen dataclass": (Frozen, lambda h: h.conv),
    "slots": (Slotted, lambda h: h.conv),
    "bound method": (lambda c: c.forward, lambda h: h.__self__),
    "unregistered module": (lambda c: [Block(c)], lambda h: h[0].conv),
    "weak reference": (weakref.ref, lambda h: h()),
    "weak proxy": (lambda c: [weakref.proxy(c)], lambda h: h[0].forward.__self__),
    "weak set": (lambda c: weakref.WeakSet([c]), lambda h: next(iter(h))),
    "weak key": (lambda c: weakref.WeakKeyDictionary({c: 1}), lambda h: next(iter(h))),
    "weak value": (lambda c: weakref.WeakValueDictionary(a=c), lambda h: h["a"]),
    "user's dict": (lambda c: collections.UserDict(a=c), lambda h: h["a"]),
    "default": (lambda c: collections.defaultdict(list, {1: [c]}), lambda h: h[1][0]),
    "method of an object": (lambda c: Slotted(c).get, lambda h: h()),
    "iterator of a list": (lambda c: iter([c]), lambda h: next(copy.copy(h))),
    "array": (array, lambda h: h[1]),
    "nested": (
        lambda c: {"a": [Named(1, frozenset({Frozen(functools.partial(print, collections.deque([(c,)])))}))]},
        lambda h: next(iter(h["a"][0].scale)).conv.args[0][0][0],
    ),
}


class Holder(nn.Module):
    def __init__(self, hold, find):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.held = (hold(self.conv),)  # nested in something that has to be rebuilt, too
        self.find = find

    def forward(self, x):
        return self.find(self.held[0])(x)


def test_every_holder_gets_the_new_convolution():
    for kind, inplace in itertools.product(HOLDERS, (False, True)):
        net = Holder(*HOLDERS[kind]).double()
        conv, expected = net.conv, net(X)
        rich = foldconv.expand(net, "doconv", inplace=inplace)
        assert type(rich.find(rich.held[0])) is foldconv.DOConv2d, kind
        assert rich.find(rich.held[0]) is rich.conv
        assert torch.equal(rich(X), expected)
        if not inplace:
            assert net.conv is net.find(net.held[0]) is conv
        plain = foldconv.fold(rich, inplace=inplace)
        assert plain.find(plain.held[0]) is plain.conv
        assert type(plain.conv) is nn.Conv2d


def test_what_stays_the_same_object_does():
    class Two(Holder):
        def __init__(self):
            super().__init__(lambda c: [c], lambda h: h[0])
            self.again, self.other, self.kept = self.held, {"a": self.held}, ([1], frozenset({2}))

    net = Two()
    kept = net.kept
    rich = foldconv.expand(net, "doconv", inplace=True)
    assert rich.held is rich.again is rich.other["a"]
    assert rich.kept is kept


class Opaque(Holder):
    def __init__(self, hold):
        super().__init__(hold, None)

    def forward(self, x):
        return self.conv(x)


def test_what_cannot_be_changed_is_refused_by_name_and_nothing_has_changed():
    for hold, name in ((lambda c: itertools.repeat(c), "repeat"), (lambda c: map(c, [1]), "map")):
        net = nn.Sequential(nn.Conv2d(3, 3, 3), Opaque(hold))
        modules = list(net.modules())
        for inplace in (True, False):
            with pytest.raises(foldconv.UnsupportedError, match=rf"^1\.held\[0\] holds .* in a {name}, .*in a list"):
                foldconv.expand(net, "doconv", inplace=inplace)
        assert list(net.modules()) == modules


def test_a_function_that_closes_over_a_module():
    net = Opaque(function).double()
    with pytest.raises(foldconv.UnsupportedError, match=r"held\[0\].*function.*original's Conv2d; pass inplace=True"):
        foldconv.expand(net, "doconv")
    rich = foldconv.expand(net, "doconv", inplace=True)
    rich.held[0](X).sum().backward()
    assert rich.conv.D.grad is not None
    net = Holder(*HOLDERS["list"])
    net.conv.register_forward_hook(lambda module, args, output: net.find)
    with pytest.raises(foldconv.UnsupportedError, match=r"_forward_hooks.*original's Holder"):
        foldconv.fold(net)


def test_kept_activations_do_not_stop_a_copy():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    y = net(torch.randn(1, 3, 6, 6))
    net.kept, net[0].kept = {"a": [(y, Frozen(y))]}, collections.deque([y])
    net[0].weight.grad = torch.ones(4, 3, 3, 3, requires_grad=True) * 2
    rich = foldconv.expand(net, "doconv")
    assert torch.equal(rich.kept["a"][0][0], y)
    assert rich.kept["a"][0][1].conv is rich[0].kept[0] is rich.kept["a"][0][0]
    assert net.kept["a"][0][0] is y
    assert foldconv.fold(rich)[0].weight.requires_grad


# ---------------------------------------------------------------------- modes


class Switching(nn.Sequential):
    """Its own code runs when the mode changes."""

    calls = 0

    def train(self, mode=True):
        Switching.calls += 1
        with torch.no_grad():
            self.scale.mul_(1.5)
        return super().train(mode)


class Kept(nn.Sequential):
    """Copied as itself, as people keep a teacher out of copies."""

    def __deepcopy__(self, memo):
        return self


class Shallow(nn.PReLU):
    def __deepcopy__(self, memo):
        return copy.copy(self)


def test_a_copy_that_is_the_model_itself_is_refused():
    for kept in (Kept(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), nn.Sequential(nn.Conv2d(3, 3, 3), Shallow())):
        for net in (kept.double(), nn.Sequential(kept, nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).double()):
            modules = list(net.modules())
            for method, inputs in (("doconv", None), ("doconv", X), ("repvgg", X)):
                with pytest.raises(foldconv.UnsupportedError, match=r"shares its .* with the original"):
                    foldconv.expand(net, method, example_inputs=inputs)
            with pytest.raises(foldconv.UnsupportedError, match=r"shares its .* with the original; pass inplace=True"):
                foldconv.fold(net)
            assert list(net.modules()) == modules
            assert not any(module._forward_hooks for module in modules)


def test_code_of_the_users_for_modes_runs_on_copies():
    net = Switching(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5))
    net.scale, net[1].training = torch.ones(1), False
    flags = [m.training for m in net.modules()]
    for method in ("doconv", "repvgg"):
        rich = foldconv.expand(net, method)
        folded = foldconv.fold(rich, batchnorm=True)
        assert [m.training for m in folded.modules()] == flags
        assert [m.training for m in net.modules()] == flags
        assert net.scale == rich.scale == 1
        Switching.calls = 0
        assert foldconv.verify(rich, folded, X.float()).layers
        foldconv.summary(rich, (1, 3, 8, 8))
        assert Switching.calls > 0
        assert [m.training for m in rich.modules()][:1] == flags[:1]
        assert net.scale == rich.scale == 1


def test_a_feature_extractor_keeps_its_mode_and_its_graph():
    from torchvision.models.feature_extraction import create_feature_extractor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return nn.functional.dropout(self.conv(x), 0.5, self.training)

    extractor = create_feature_extractor(Net().double(), ["conv", "dropout"]).eval()
    for mode in (False, True):
        copied = copy_of(extractor.train(mode))
        assert [m.training for m in copied.modules()] == [m.training for m in extractor.modules()]
        torch.manual_seed(0)
        expected = extractor(X)["dropout"]
        torch.manual_seed(0)
        assert torch.equal(copied(X)["dropout"], expected)
        with evaluation(extractor) as running:
            assert torch.equal(running(X)["dropout"], running(X)["conv"])
        assert [m.training for m in extractor.modules()] == [mode] * len(list(extractor.modules()))


# ---------------------------------------------------------------------- wrappers


def pair():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double().eval()
    net[1].running_mean += 1
    return net


WRAPPERS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_root_is_looked_through(kind, tmp_path):
    net = pair()
    wrapped = WRAPPERS[kind](net)
    assert unwrapped(wrapped) is net
    assert str(foldconv.summary(wrapped, (1, 3, 8, 8))) == str(foldconv.summary(net, (1, 3, 8, 8)))
    assert len(foldconv.parameter_groups(wrapped, 0.1)) == 2
    for method in ("doconv", "repvgg"):
        rich = foldconv.expand(wrapped, method)
        assert type(rich) is nn.Sequential
        assert torch.allclose(rich(X), net(X))
        again = WRAPPERS[kind](rich)
        with foldconv.composed_once(again), torch.no_grad():
            assert torch.allclose(again(X), net(X))
        folded = foldconv.fold(again, batchnorm=True)
        assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity]
        assert torch.allclose(folded(X), net(X))
        report = foldconv.verify(again, WRAPPERS[kind](folded), X)
        assert report.ok(1e-12)
        assert [layer.name for layer in report.layers] == ["0"]
        assert foldconv.regularization(again) == foldconv.regularization(rich)
        foldconv.save(again, tmp_path / "a.safetensors")
        loaded = foldconv.load(tmp_path / "a.safetensors", WRAPPERS[kind](pair()))
        assert loaded.state_dict().keys() == rich.state_dict().keys()
        assert torch.equal(loaded.eval()(X), rich(X))
    assert foldconv.fold(foldconv.expand(WRAPPERS[kind](nn.Conv2d(1, 1, 3)), "doconv")).in_channels == 1


def test_wrapped_and_compiled_parts(tmp_path):
    for wrap in WRAPPERS.values():
        for inplace in (False, True):
            net = nn.Sequential(pair(), nn.Conv2d(4, 2, 1).double()).eval()
            expected, keys = net(X), list(net.state_dict())
            net[0], net[1] = wrap(net[0]), wrap(net[1])
            net.compile(backend="eager")
            net(X)
            foldconv.save(net, tmp_path / "a.safetensors")
            assert list(state_of(net)) == keys
            rich = foldconv.expand(net, "doconv", inplace=inplace)
            assert [name for name, m in rich.named_modules() if isinstance(m, foldconv.DOConv2d)] == ["0.0"]
            assert torch.allclose(rich(X), expected)
            with torch.no_grad():
                rich[0][0].weight.zero_()
                assert not torch.allclose(rich(X), expected)
            folded = foldconv.fold(rich, inplace=inplace)
            assert list(folded.state_dict()) == keys
            assert torch.allclose(folded(X), rich(X))


def test_branches_are_switched_in_place_and_back():
    rich = foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), "repvgg").train()
    rich[0].own_norm.eval()
    flags = [module.training for module in rich.modules()]
    with evaluation(rich) as running:
        assert running is rich
        assert not any(module.training for module in rich.modules())
    assert [module.training for module in rich.modules()] == flags
