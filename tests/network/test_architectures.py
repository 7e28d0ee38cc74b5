"""Other people's networks, whole: expand, train, fold, absorb, and load back into the original class."""

import copy
import dataclasses
import functools

import pytest
import timm
import torch
import torchvision
from timm.utils.model import reparameterize_model
from torch import nn

import foldconv
from foldconv.algebra.norms import is_norm
from foldconv.network.tree import foldable_layers


@dataclasses.dataclass(frozen=True)
class Case:
    """An architecture, how many of its layers expand, how many batch norms it has, and how many are branches alone.

    At `size` pixels some output of each layer sees more of its input than the centre of its kernel.
    """

    create: functools.partial
    expanded: int
    norms: int
    identities: int = 0
    size: int = 64


def of_timm(name, **options):
    return functools.partial(timm.create_model, name, pretrained=False, num_classes=10, **options)


def of_torchvision(create, **options):
    return functools.partial(create, weights=None, num_classes=10, **options)


deeplab = functools.partial(torchvision.models.segmentation.deeplabv3_resnet50, weights_backbone=None)

CASES = {
    "timm resnet18": Case(of_timm("resnet18"), 17, 20),
    "timm resnext50_32x4d": Case(of_timm("resnext50_32x4d"), 17, 53),
    "timm mobilenetv3_large_100": Case(of_timm("mobilenetv3_large_100"), 16, 46),
    "timm convnext_atto": Case(of_timm("convnext_atto"), 16, 0),  # its norms are LayerNorms
    "timm efficientnet_b0": Case(of_timm("efficientnet_b0"), 17, 49),
    "timm repvgg_a0": Case(of_timm("repvgg_a0"), 22, 61, identities=17),
    "torchvision resnet50": Case(of_torchvision(torchvision.models.resnet50), 17, 53),
    "torchvision deeplabv3_resnet50": Case(of_torchvision(deeplab), 21, 60, size=48),
    "torchvision mobilenet_v2": Case(of_torchvision(torchvision.models.mobilenet_v2), 18, 52),
}


def network(case):
    """The architecture in evaluation mode with random norm statistics, of a size that keeps activations in range."""
    torch.manual_seed(0)
    model = case.create().eval()
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model


def norms_of(model):
    return [name for name, module in model.named_modules() if is_norm(module)]


def image(size=64, dtype=torch.float32, seed=1):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@torch.no_grad()
def output(model, x):
    found = model(x)
    return found["out"] if isinstance(found, dict) else found


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def plain(case):
    return network(case)


@pytest.fixture(scope="module")
def exact(plain):
    return copy.deepcopy(plain).double()


@pytest.fixture(scope="module")
def trained(case, plain):
    """Expanded and trained for three steps on noise, in evaluation mode again."""
    model = foldconv.expand(plain, "doconv")
    assert len(foldable_layers(model)) == case.expanded
    x = image(case.size)
    assert relative(output(model, x), output(plain, x)) <= 1e-5
    for module in model.modules():
        module.training = not is_norm(module)  # statistics stay as drawn
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        found = model(image(case.size, seed=2 + step))
        found = found["out"] if isinstance(found, dict) else found
        loss = found.square().mean() / found.detach().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def learned(case, trained):
    """An image, and what the trained network says of it."""
    x = image(case.size)
    return x, output(trained, x)


@pytest.fixture(scope="module")
def folded(trained):
    return foldconv.fold(trained)


def test_expand_keeps_the_function(case, exact):
    """In float64; in float32 before `trained` is."""
    model = foldconv.expand(exact, "doconv")
    x = image(case.size, torch.float64)
    assert relative(output(model, x), output(exact, x)) <= 1e-12


def test_training_changed_the_function_and_fold_kept_it(plain, trained, learned, folded):
    x, found = learned
    assert all(layer.D.abs().max() > 0 for layer in foldable_layers(trained).values())
    assert relative(found, output(plain, x)) > 1e-3
    assert relative(output(folded, x), found) <= 1e-5


def test_folded_state_dict_is_the_originals(plain, learned, folded):
    fresh = copy.deepcopy(plain)
    shapes = {key: (value.shape, value.dtype) for key, value in fresh.state_dict().items()}
    state = folded.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == shapes
    assert list(state) == list(fresh.state_dict())
    assert [type(m) for m in folded.modules()] == [type(m) for m in fresh.modules()]
    for value in fresh.state_dict().values():
        value.zero_()
    fresh.load_state_dict(state, strict=True)
    x, _ = learned
    assert torch.equal(output(fresh, x), output(folded, x))


def test_absorbing_leaves_no_norm(case, plain, trained, learned):
    absorbed = foldconv.fold(trained, batchnorm=True)
    assert len(norms_of(plain)) == case.norms
    assert norms_of(absorbed) == []
    assert not foldable_layers(absorbed)
    x, found = learned
    assert relative(output(absorbed, x), found) <= 1e-4


def test_absorbing_is_exact_in_float64(case, exact):
    x = image(case.size, torch.float64)
    expected = output(exact, x)
    # The norm of an identity branch follows no convolution; only the fold of the whole block has a place for it.
    for blocks, left in ((None, 0), (False, case.identities)) if case.identities else ((None, 0),):
        absorbed = foldconv.fold(exact, batchnorm=True, blocks=blocks, check=False)
        assert len(norms_of(absorbed)) == left
        assert all(n.endswith("identity") for n in norms_of(absorbed))
        assert relative(output(absorbed, x), expected) <= 1e-10


def test_timms_own_folding_still_works_after_ours():
    model = foldconv.expand(network(CASES["timm repvgg_a0"]), "doconv").double()
    with torch.no_grad():
        for layer in foldable_layers(model).values():
            layer.D.uniform_(-0.05, 0.05)
    x = image(dtype=torch.float64)
    expected = output(model, x)
    folded = foldconv.fold(model)
    assert relative(output(folded, x), expected) <= 1e-10
    once = reparameterize_model(folded)
    assert norms_of(once) == []
    assert sum(isinstance(m, nn.Conv2d) for m in once.modules()) == 22
    assert relative(output(once, x), expected) <= 1e-10
    # And what timm has folded is a network like any other.
    again = foldconv.expand(once, "doconv")
    assert len(foldable_layers(again)) == 22
    assert relative(output(foldconv.fold(again), x), expected) <= 1e-10
