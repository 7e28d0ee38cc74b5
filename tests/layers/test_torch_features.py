"""Composed layers inside the rest of torch: each feature gives what the plain network, or the eager run, gives."""

import copy
import shutil
import sys

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from foldconv import DOConv2d, DOConvTranspose2d, fold

COMPOSITIONS = ("kernel", "feature")
uses_torchscript = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


def network(composition="kernel", norm=True, **options):
    """Strided, grouped, transposed and pointwise DO-Convs, far from their plain start."""
    torch.manual_seed(0)
    options |= {"composition": composition}
    net = nn.Sequential(
        DOConv2d(3, 8, 3, padding=1, bias=not norm, depth_multiplier=11, **options),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        DOConv2d(8, 8, 3, stride=2, padding=1, groups=2, padding_mode="circular", **options),
        DOConv2d(8, 6, 1, **options),
        nn.ReLU(),
        DOConvTranspose2d(6, 4, 2, stride=2, **options),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for name, p in net.named_parameters():
        if name.endswith("D"):
            nn.init.normal_(p, std=0.3)
    return net.double()


def images(n=4):
    return torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def same(received, wanted, tolerance=1e-10):
    torch.testing.assert_close(received, wanted, rtol=tolerance, atol=tolerance)


def run(net, function, x):
    """Output and all gradients of one step through `function`, a form of `net`."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


def perturb(net):
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)


# ---------------------------------------------------------------------- compilers and exporters


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compile_in_one_graph(fresh_compiler, composition, training):
    eager = network(composition).train(training)
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, want in zip(run(net, compiled, images()), run(eager, eager, images()), strict=True):
            same(got, want)
        perturb(net)
        perturb(eager)
    with torch.no_grad():
        same(compiled(images()), eager(images()))
        perturb(net)
        perturb(eager)
        same(compiled(images()), eager(images()))
    same(net(images()), eager(images()))


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="inductor needs a C++ compiler")
@torch._inductor.config.patch(compile_threads=1)  # no pool of worker processes
def test_inductor(fresh_compiler):
    torch.manual_seed(0)
    eager = DOConv2d(3, 4, 3, padding=1)
    nn.init.normal_(eager.D, std=0.3)
    net = copy.deepcopy(eager)
    x = images().float()
    for got, want in zip(run(net, torch.compile(net, fullgraph=True), x), run(eager, eager, x), strict=True):
        same(got, want, tolerance=1e-4)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("strict", [True, False])
def test_export(composition, strict):
    net = network(composition).eval()
    n = torch.export.Dim("n", min=2)
    program = torch.export.export(net, (images(),), strict=strict, dynamic_shapes=({0: n},))
    same(program.module()(images(7)), net(images(7)))
    assert set(program.state_dict) == set(net.state_dict())
    assert not program.constants
    state = {k: v * 1.1 for k, v in net.state_dict().items() if v.is_floating_point()}
    moved = program.module()
    moved.load_state_dict(state, strict=False)
    net.load_state_dict(state, strict=False)
    same(moved(images()), net(images()))


@uses_torchscript
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace():
    net = network().eval()
    wanted = net(images())
    traced = torch.jit.trace(net, images())
    same(traced(images()), wanted)
    perturb(net)
    same(traced(images()), net(images()))


# ---------------------------------------------------------------------- precision and memory format


@pytest.fixture
def composed_dtypes(monkeypatch):
    seen = []
    original = DOConv2d.compose

    def watched(self, *parameters):
        kernel = original(self, *parameters)
        seen.append((kernel.dtype, *(p.dtype for p in parameters if p is not None)))
        return kernel

    monkeypatch.setattr(DOConv2d, "compose", watched)
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_autocast_composes_in_float32(composed_dtypes, training):
    net = network(norm=False).float().train(training)
    x = images().float()
    wanted = run(net, net, x)
    composed_dtypes.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernel = net[0].kernel()
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert set(sum(composed_dtypes, ())) == {torch.float32}
    # Rounding inside the composition would show here: bfloat16 is good for two digits.
    same(kernel, net[0].kernel(), tolerance=1e-6)
    same(y.float(), wanted[0], tolerance=0.05)

    def under_autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x)

    composed_dtypes.clear()
    for got, want in zip(run(net, under_autocast, x), wanted, strict=True):
        assert F.cosine_similarity(got.float().flatten(), want.flatten(), 0) > 0.99
    assert set(sum(composed_dtypes, ())) == {torch.float32}, "also inside the backward"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_parameters_compose_in_float32(composed_dtypes, dtype, training):
    net = network(norm=False).to(dtype).train(training)
    exact = copy.deepcopy(net).double()
    kernel = net[0].kernel()
    assert kernel.dtype == dtype
    assert set(sum(composed_dtypes, ())) == {torch.float32}
    # Composed in float32 and rounded once: half a unit in the last place, no more.
    assert (
        (kernel.double() - exact[0].kernel()).abs() <= 0.51 * torch.finfo(dtype).eps * exact[0].kernel().abs()
    ).all()
    for got, want in zip(run(net, net, images().to(dtype)), run(exact, exact, images()), strict=True):
        assert got.dtype == dtype
        assert F.cosine_similarity(got.double().flatten(), want.flatten(), 0) > 0.98


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last(composition, training):
    net = network(composition).train(training)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    convs = [m for m in last if isinstance(m, (DOConv2d, DOConvTranspose2d))]
    x = images().contiguous(memory_format=torch.channels_last)
    for got, want in zip(run(last, last, x), run(net, net, images()), strict=True):
        same(got, want)
    assert last[0](x).is_contiguous(memory_format=torch.channels_last)
    for conv in convs:
        for weight in (conv.weight, conv.kernel(), conv.fold().weight):
            assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.optim.SGD(last.parameters(), lr=0.1).step()
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)


# ---------------------------------------------------------------------- training loops


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_gradient_accumulation_equals_the_big_batch(composition, training):
    net, x = network(composition, norm=False).train(training), images(8)
    whole = run(net, net, x)[2:]
    net.zero_grad()
    for part in x.split(3):
        net(part).square().sum().backward()
    for p, want in zip(net.parameters(), whole, strict=True):
        same(p.grad, want)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing(use_reentrant, training):
    net, x = network(norm=False).train(training), images()
    wanted = run(net, net, x)
    received = run(net, lambda x: checkpoint(net, x, use_reentrant=use_reentrant), x)
    for got, want in zip(received, wanted, strict=True):
        same(got, want)


@pytest.mark.parametrize("training", [True, False])
def test_training_equals_training_by_the_definition(training):
    """Five steps of Adam against a network whose kernel is written out, with evaluations in between."""
    torch.manual_seed(0)
    made = DOConv2d(3, 5, 3, padding=1, dtype=torch.float64).train(training)
    weight, bias, d = (nn.Parameter(p.detach().clone()) for p in (made.weight, made.bias, made.D))

    def oracle(x):
        kernel = torch.einsum("ims,ois->oim", torch.eye(9, dtype=torch.float64) + d, weight.flatten(2))
        return F.conv2d(x, kernel.reshape(weight.shape), bias, padding=1)

    ours = torch.optim.Adam(made.parameters(), lr=0.05, weight_decay=0.1)
    theirs = torch.optim.Adam([weight, bias, d], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        for function, optimizer in ((made, ours), (oracle, theirs)):
            optimizer.zero_grad()
            (function(images()) - 1).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            made.eval()
            same(made(images()), oracle(images()))
            made.train(training)
    same(made.D, d)
    assert d.abs().max() > 0.01


# ---------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_functional_call(composition, training):
    net, x = network(composition, norm=False).train(training), images()
    other = {k: v.detach() * 1.1 for k, v in net.named_parameters()}
    before = net(x)
    received = functional_call(net, other, (x,))
    same(net(x), before)
    gradients = grad(lambda parameters: functional_call(net, parameters, (x,)).square().sum())(other)
    perturb(net)
    same(received, net(x))
    for want, (name, _) in zip(run(net, net, x)[2:], net.named_parameters(), strict=True):
        same(gradients[name], want)


def test_functional_call_with_parameters_of_another_network():
    net, x = network(norm=False).eval(), images()
    other = copy.deepcopy(net)
    perturb(other)
    with torch.no_grad():
        for _ in range(2):
            same(functional_call(net, dict(other.named_parameters()), (x,)), other(x))
            same(net(x), copy.deepcopy(net)(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_vmap_over_an_ensemble(composition, training):
    nets = [network(composition, norm=False).train(training) for _ in range(3)]
    for i, net in enumerate(nets):
        for p in net.parameters():
            p.data.mul_(1 + 0.1 * i)
    parameters, buffers = stack_module_state(nets)
    base, x = copy.deepcopy(nets[0]), images()

    def loss(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,)).square().sum()

    gradients = vmap(grad(loss), (0, 0, None))(parameters, buffers, x)
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    for i, net in enumerate(nets):
        wanted = run(net, net, x)
        same(outputs[i], wanted[0])
        for want, (name, _) in zip(wanted[2:], net.named_parameters(), strict=True):
            same(gradients[name][i], want)


@uses_torchscript  # inside torch's jvp
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_transforms_of_the_input(composition, training):
    net, x = network(composition, norm=False).train(training), images(2)
    plain = fold(net)
    net(x)
    same(vmap(lambda one: net(one[None])[0])(x), plain(x))
    same(jacrev(net)(x), jacrev(plain)(x))
    same(jvp(net, (x,), (x.cos(),)), jvp(plain, (x,), (x.cos(),)))


# ---------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}], ids=["swa", "ema"])
def test_averaged_model_is_evaluated_between_updates(options):
    net, x = network(norm=False), images()
    average = AveragedModel(net, **options).eval()  # never told again that it changes
    shadow = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    outputs = []
    for step in range(4):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)
        weight = (1.0 if step == 0 else 0.5) if options else 1 / (step + 1)
        for mean, p in zip(shadow, net.parameters(), strict=True):
            mean.lerp_(p.detach(), weight)
        with torch.no_grad():
            outputs.append(average(x))
            same(average(x), functional_call(net, dict(zip(dict(net.named_parameters()), shadow)), (x,)))
    assert (outputs[-1] - outputs[0]).abs().max() > 1e-6


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_update_bn(composition):
    net = network(composition)
    average = AveragedModel(net).eval()
    with torch.no_grad():
        average(images())
    perturb(net)
    average.update_parameters(net)
    average.update_parameters(net)
    batches = images(12).split(4)
    plain = fold(average.module)
    update_bn(batches, average)
    update_bn(batches, plain)
    same(average.module[1].running_mean, plain[1].running_mean)
    same(average.module[1].running_var, plain[1].running_var)
    same(average.eval()(images()), plain.eval()(images()))
