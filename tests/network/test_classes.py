"""Forwards that ask for a layer's exact class, which a replaced layer would answer otherwise."""

import pytest
import torch
from torch import nn

import foldconv
from foldconv.layers import Foldable

KINDS = (nn.Conv2d, nn.Linear)
TABLE = {nn.Conv2d: True, nn.ReLU: False}
REASON = "the model asks for its exact class"
X = torch.randn(2, 3, 9, 9, dtype=torch.float64)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.takes(layer) else x
        return x


class Compared(Layers):
    def takes(self, layer):
        return nn.Conv2d == type(layer)  # noqa: E721


class OneOf(Layers):
    def takes(self, layer):
        return type(layer) in (nn.ReLU, nn.modules.Conv2d)


class OneOfGlobal(Layers):
    def takes(self, layer):
        return layer.__class__ in KINDS


class OneOfItsOwn(Layers):
    kinds = frozenset(KINDS)

    def takes(self, layer):
        return type(layer) not in {nn.ReLU} and type(layer) in self.kinds


class Named(Layers):
    def takes(self, layer):
        return layer.__class__.__name__ == "Conv2d"


class NamedInPart(Layers):
    def takes(self, layer):
        return type(layer).__name__.lower().startswith("conv")


class LookedUp(Layers):
    def takes(self, layer):
        return TABLE.get(type(layer))


class LookedUpHere(Layers):
    def takes(self, layer):
        return {nn.Conv2d: True, nn.BatchNorm2d: False, nn.ReLU: True}.get(type(layer))


class GivenAName(Layers):
    def takes(self, layer):
        kind = type(layer)
        return kind is nn.Conv2d


class Inherited(GivenAName):
    def takes(self, layer):
        return super().takes(layer)


def is_convolution(layer):
    return type(layer) is nn.Conv2d


class ByFunction(Layers):
    def takes(self, layer):
        return is_convolution(layer)


ASKING = [Compared, OneOf, OneOfGlobal, OneOfItsOwn, Named, NamedInPart, LookedUp, LookedUpHere, GivenAName, Inherited]
ASKING += [ByFunction]


@pytest.mark.parametrize("network", ASKING)
@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_layers_whose_exact_class_is_asked_for_stay(network, method):
    net = network().double().eval()
    (row,) = foldconv.plan(net, method, example_inputs=X).rows
    assert not row.taken
    assert method == "repvgg" or row.why.startswith(REASON)
    assert not foldconv.plan(net, method).rows[0].taken
    with pytest.raises(foldconv.FoldConvError, match=r"exact class|norm"):
        foldconv.expand(net, method, include="layers.0", example_inputs=X)
    torch.testing.assert_close(foldconv.fold(net, batchnorm=True, example_inputs=X)(X), net(X), rtol=0, atol=0)


class NormAskedFor(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = 2 * layer(x) if type(layer) is nn.BatchNorm2d else layer(x)
        return x


def test_norms_whose_exact_class_is_asked_for_stay():
    net = NormAskedFor(nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU()).double().eval()
    (row,) = foldconv.plan(net, "repvgg", example_inputs=X).rows
    assert not row.taken
    assert "the model asks for its class" in row.evidence
    rich = foldconv.expand(net, "doconv", example_inputs=X)
    plain = foldconv.fold(rich, batchnorm=True, example_inputs=X)
    assert isinstance(plain[1], nn.BatchNorm2d)
    torch.testing.assert_close(plain(X), net(X), rtol=1e-10, atol=1e-10)


class Instances(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = 2 * layer(x) if isinstance(layer, (self.kind, nn.ReLU)) else layer(x)
        return x


class Convolutions(Instances):
    kind = nn.Conv2d


class Norms(Instances):
    kind = nn.modules.batchnorm._BatchNorm


class Matched(nn.Sequential):
    def forward(self, x):
        for layer in self:
            match layer:
                case nn.Conv2d():
                    x = 2 * layer(x)
                case _:
                    x = layer(x)
        return x


@pytest.mark.parametrize("network", [Convolutions, Norms, Matched])
def test_branches_take_the_place_of_no_layer_whose_class_is_asked_for(network):
    net = network(nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU()).double().eval()
    for method in ("repvgg", "mobileone"):
        (row,) = foldconv.plan(net, method, example_inputs=X).rows
        assert not row.taken
        assert "the model asks for its class" in row.why + row.evidence
    rich = foldconv.expand(net, "doconv", example_inputs=X)
    assert isinstance(rich[0], Foldable)
    plain = foldconv.fold(rich, batchnorm=True, example_inputs=X)
    assert isinstance(plain[1], nn.BatchNorm2d)
    torch.testing.assert_close(plain(X), net(X), rtol=1e-10, atol=1e-10)


class Harmless(Layers):
    def forward(self, x):
        if type(x) is tuple or type(self) is nn.Conv2d or type(x).__name__ == "Parameter":
            raise TypeError(f"{self.__class__.__name__}: received {type(x).__name__}")
        return super().forward(x)

    def takes(self, layer):
        return isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)) or type(layer) is nn.ReLU


def test_other_questions_are_none():
    net = Harmless().double().eval()
    rich = foldconv.expand(net, "doconv", example_inputs=X)
    assert isinstance(rich.layers[0], Foldable)
    torch.testing.assert_close(rich.eval()(X), net(X), rtol=1e-10, atol=1e-10)
