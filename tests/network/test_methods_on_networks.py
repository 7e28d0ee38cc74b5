"""Every method on other people's networks: expanded, trained two steps, folded, verified, loaded back."""

import functools

import pytest
import torch

import foldconv
from foldconv.network.tree import evaluation
from foldconv.testing import randomize

timm = pytest.importorskip("timm")

NETWORKS = ["resnet18", "resnet50", "repvgg_a0", "mobilenetv3_large_100", "convnext_atto"]
METHODS = [name for name in foldconv.list_methods() if name != "doconv"]  # doconv: tests/test_architectures.py
# Four times as wide inside, the default, takes minutes to solve for the start on two cores.
CONFIGS = {"expandnet": foldconv.ExpandNet(rate=1)}
# Where nothing can be expanded, with the reason that is given.
NOTHING = {("dilated", name): "it is not depthwise" for name in ("resnet18", "resnet50", "repvgg_a0")}


@functools.cache
def network(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10)
    randomize(net)
    return net.eval()


def images(n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_a_network(method, name):
    net, x = network(name), images()
    if (method, name) in NOTHING:
        with pytest.raises(foldconv.NoMatchError, match=NOTHING[method, name]):
            foldconv.expand(net, method)
        return
    rich = foldconv.expand(net, CONFIGS.get(method, method))
    with torch.no_grad():
        before = net(x)
        close(rich(x), before, 1e-4)
    optimizer = torch.optim.SGD(foldconv.parameter_groups(rich, 1e-4), lr=2e-3)
    rich.train()
    for _ in range(2):  # what is a factor of zeros has no gradient in the first
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(rich(images(4)), torch.arange(4)).backward()
        optimizer.step()
    with torch.no_grad(), evaluation(rich) as running:
        trained = running(x)
        assert (trained - before).abs().max() > 1e-4 * before.abs().max()
        folded = foldconv.fold(rich, check=False)  # the check runs in the conformance battery
        close(folded.eval()(x), trained, 1e-3)
        assert foldconv.verify(rich, folded, x).ok(1e-3)
        shapes = {key: value.shape for key, value in net.state_dict().items()}
        if method != "dgconv":  # its fold may have more groups
            assert {key: value.shape for key, value in folded.state_dict().items()} == shapes
