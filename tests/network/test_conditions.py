"""Other defaults, inference mode, edited attributes, scripted parts: right, or refused in one line."""

import contextlib

import pytest
import torch
from torch import nn

import foldconv
from foldconv.network.branches import branches
from foldconv.network.permute import absorb_permutations

X = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(**options):
    options = {"padding": 1, "bias": False} | options
    net = nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double().eval()
    net[1].running_mean += 0.5
    return net


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CONDITIONS = {
    "device": lambda: torch.device("meta"),
    "default device": default_device,
    "default dtype": default_dtype,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_conditions_of_the_caller(kind, tmp_path):
    for method in ("doconv", "repvgg", "dgconv"):
        net = network()
        with CONDITIONS[kind]():
            rich = foldconv.expand(net, method, include="0", example_inputs=X)
            if method == "dgconv":
                with torch.no_grad():
                    rich[0].gates.copy_(torch.tensor([1.0, -1.0], device="cpu"))
            plain, absorbed = foldconv.fold(rich), foldconv.fold(rich, batchnorm=True, example_inputs=X)
            plain = absorb_permutations(plain)
            foldconv.save(rich, tmp_path / "a.safetensors")
            again = foldconv.load(tmp_path / "a.safetensors", net).eval()
            foldconv.summary(rich, (1, 4, 8, 8))
            branches(rich)
        with torch.no_grad():
            expected = rich(X)
        for found in (plain, absorbed, again):
            assert torch.allclose(found(X), expected, rtol=1e-10, atol=1e-10), method
            found(X).sum().backward()
            assert {(p.dtype, p.device.type) for p in found.parameters()} == {(torch.float64, "cpu")}
            assert all(p.grad is not None for p in found.parameters() if p.requires_grad and p.is_floating_point())


def test_made_in_inference_mode():
    with torch.inference_mode():
        net = network()
        rich = foldconv.expand(net, "doconv")
    for found in (rich, foldconv.fold(net, batchnorm=True), foldconv.fold(rich)):
        found(X).sum().backward()
        assert found[0].weight.grad is not None


# ---------------------------------------------------------------------- edited by hand


def set_to(**values):
    def edit(conv):
        for name, value in values.items():
            setattr(conv, name, value)

    return edit


def summed(conv):
    conv.weight = nn.Parameter(conv.weight.detach().sum(1, keepdim=True))


def cut(conv):
    conv.weight = nn.Parameter(conv.weight.detach()[..., 1:])


EDITS = [
    (summed, {}),
    (cut, {}),
    (set_to(bias=nn.Parameter(torch.ones(4, dtype=torch.float64))), {}),
    (set_to(stride=2, dilation=(1, 2)), {}),
    (set_to(padding=2), {}),
    (set_to(padding="same"), {}),
    (set_to(padding="valid"), {}),
    (set_to(padding_mode="reflect"), {}),
    (set_to(padding_mode="circular", padding=0), {}),
    (set_to(padding=(2, 2)), {"padding_mode": "reflect"}),
    (set_to(padding_mode="zeros"), {"padding_mode": "reflect"}),
    (set_to(dilation=(2, 2)), {"padding": "same"}),
    (set_to(dilation=(2, 2)), {"padding": "same", "padding_mode": "circular"}),
    (set_to(in_channels=7, out_channels=9, kernel_size=(5, 5)), {}),
    (set_to(groups=2, weight=nn.Parameter(torch.rand(4, 2, 3, 3, dtype=torch.float64))), {}),
]


@pytest.mark.parametrize("which", range(len(EDITS)))
def test_edited_convolutions_compute_what_they_compute(which):
    edit, options = EDITS[which]
    net = network(**options)
    edit(net[0])
    x = X[:, : net[0].weight.shape[1] * net[0].groups]
    expected = net(x)
    assert torch.allclose(foldconv.fold(net, batchnorm=True)(x), expected)
    for method in ("doconv", "orepa", "repvgg", "acnet"):
        try:
            rich = foldconv.expand(net, method, include="0").eval()
        except foldconv.NoMatchError:
            assert method == "acnet", method
            continue
        for found in (rich, foldconv.fold(rich), foldconv.fold(rich, batchnorm=True)):
            assert torch.allclose(found(x), expected, rtol=1e-9, atol=1e-9), method


def test_padding_that_no_argument_describes():
    net = nn.Sequential(nn.Conv2d(3, 4, 4, padding="same", padding_mode="circular"))
    foldconv.expand(net, "doconv")
    net[0].dilation = (2, 2)
    with pytest.raises(foldconv.NoMatchError, match=r"0: it pads \(\(1, 2\), \(1, 2\)\) \(circular\).*build it anew"):
        foldconv.expand(net, "doconv")


# ---------------------------------------------------------------------- scripted, traced, exported


@pytest.mark.filterwarnings("ignore")  # torch's own, that it would rather not be asked to
def test_scripted_networks():
    net = network()
    rich = foldconv.expand(net, "doconv")
    for make in (lambda n: torch.jit.trace(n, X), torch.jit.script, lambda n: torch.jit.freeze(torch.jit.script(n))):
        scripted = make(net)
        for change in (lambda n: foldconv.expand(n, "doconv"), foldconv.fold):
            with pytest.raises(foldconv.UnsupportedError, match=r"^the model is scripted or traced .*made from"):
                change(scripted)
        assert foldconv.verify(net, scripted, X).ok()
        assert foldconv.verify(scripted, net, X).ok()
        assert foldconv.summary(scripted, X).macs_folded == 0
        outer = nn.Sequential(scripted, nn.Conv2d(2, 2, 3).double()).eval()
        for found in (foldconv.expand(outer, "doconv"), foldconv.fold(outer, batchnorm=True)):
            assert torch.allclose(found(X), outer(X))
    traced = torch.jit.trace(rich, X)
    assert foldconv.verify(rich, traced, X).uncompared == ("0", "3")
    with pytest.raises(foldconv.UnsupportedError, match=r"^0\.0 is scripted or traced"):
        foldconv.fold(nn.Sequential(traced))
