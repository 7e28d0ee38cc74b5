"""Branches by the moments of their input are the branches: outputs, gradients, statistics. And where not."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import foldconv
import foldconv.ops._moments
from foldconv.algebra import Sum
from foldconv.methods import _moments, _windows
from foldconv.methods._moments import MomentSum
from foldconv.methods.dbb import PaddedWindow
from foldconv.testing import randomize

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(_moments, "SLOWER", 1e9)
    monkeypatch.setattr(_moments, "FEW", 0)
    monkeypatch.setattr(foldconv.ops._moments, "SMALL", 0)


@pytest.fixture
def calls(monkeypatch):
    """One entry per sum that ran by moments."""
    found, add = [], _moments.add_points
    monkeypatch.setattr(_moments, "add_points", lambda *args: found.append(1) or add(*args))
    return found


def expanded(conv, norm, method="repvgg"):
    rich = foldconv.expand(nn.Sequential(conv, *([norm] if norm else [])).double(), method)
    randomize(rich)
    return rich.train()


def by_branches(rich):
    twin = copy.deepcopy(rich)
    for module in twin.modules():
        if type(module) is MomentSum:
            module.__class__ = Sum
        if isinstance(module, PaddedWindow):
            module.moments = False
    return twin


def results(net, x, second=False):
    """Output, gradients, buffers after two batches; and gradients of a gradient."""
    x = x.detach().requires_grad_()
    net(x)
    y = net(x)
    assert not any(buffer.requires_grad for buffer in net.buffers())  # no statistic holds a graph
    probe = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    found = torch.autograd.grad((y * probe).sum(), wanted, create_graph=second)
    if second:
        found += torch.autograd.grad(sum(g.square().sum() for g in found), wanted, allow_unused=True)
    return [y, *(t for t in found if t is not None), *net.buffers()]


def assert_same(rich, x, second=False):
    twin = by_branches(rich)
    received, expected = results(rich, x, second), results(twin, x, second)
    assert len(received) == len(expected)
    for a, b in zip(received, expected):
        torch.testing.assert_close(a, b, **CLOSE)


def image(*shape, last=False):
    x = torch.randn(*(shape or (3, 4, 7, 6)), dtype=torch.float64)
    return x.to(memory_format=torch.channels_last) if last else x


GEOMETRIES = [
    {"padding": 1},
    {"padding": 1, "stride": 2},
    {},
    {"stride": (2, 1)},
    {"padding": 1, "groups": 2, "bias": True},
    {"dilation": 2, "padding": 2},
    {"kernel_size": (2, 4), "padding": "same"},
    {"padding": 1, "padding_mode": "reflect", "stride": 2},
    {"padding": 1, "padding_mode": "circular"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_is_the_branches(calls):
    for number, geometry in enumerate(GEOMETRIES):
        for out in (4, 6):
            conv = nn.Conv2d(4, out, **{"kernel_size": 3, "bias": False} | geometry)
            assert_same(expanded(conv, nn.BatchNorm2d(out)), image(last=bool(number % 2) == (out == 4)), out == 4)
    assert len(calls) == 2 * 2 * len(GEOMETRIES)


def test_ranks_and_single_channels(calls):
    assert_same(expanded(nn.Conv1d(4, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4)), image(3, 4, 9))
    assert_same(expanded(nn.Conv3d(4, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4)), image(3, 4, 4, 5, 3))
    assert_same(expanded(nn.Conv2d(4, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)), image(last=True))
    assert_same(expanded(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)), image(3, 1, 7, 6, last=True))
    assert_same(expanded(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)), image(3, 4, 1, 1, last=True))
    assert len(calls) == 10


def test_kinds_of_norm(calls):
    for norm in (
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, eps=0.1, momentum=0.3),
        None,
    ):
        assert_same(expanded(nn.Conv2d(4, 4, 3, padding=1), norm), image(), norm is not None and norm.affine)
    rich = expanded(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    body = rich[0].body
    body.point.norm.register_parameter("weight", None)
    body.identity[0].register_parameter("bias", None)
    body.point.norm.momentum = None
    body.identity[0].num_batches_tracked = None
    assert_same(rich, image())
    assert len(calls) == 10


def test_what_is_frozen_gets_no_gradient():
    rich, x = expanded(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), image()
    twin = by_branches(rich)
    for net in (rich, twin):
        net.requires_grad_(False)
        net[0].body.point.norm.weight.requires_grad_(True)
        net(x).square().sum().backward()
    assert [p.grad is None for p in rich.parameters()] == [p.grad is None for p in twin.parameters()]
    torch.testing.assert_close(rich[0].body.point.norm.weight.grad, twin[0].body.point.norm.weight.grad, **CLOSE)


def test_single_precision_and_large_means(calls):
    rich = expanded(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)).float()
    for x in (image(4, 8, 9, 9), image(4, 8, 9, 9) + 3):
        twin = copy.deepcopy(rich).double()
        torch.testing.assert_close(rich(x.float()).double(), by_branches(twin)(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
    # The variance would be a small difference of large squares.
    x = image(4, 8, 9, 9) + 1000
    torch.testing.assert_close(rich(x.float()), by_branches(rich)(x.float()), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_where_the_branches_run(calls):
    def check(change, x=None):
        rich = expanded(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        change(rich, rich[0].body)
        x = image() if x is None else x
        twin = by_branches(rich)
        torch.testing.assert_close(rich(x), twin(x), rtol=0, atol=0)

    check(lambda net, body: net.eval())
    check(lambda net, body: body.point.norm.eval())
    check(lambda net, body: body.main.norm.eval())
    check(lambda net, body: body.point.conv.register_forward_hook(lambda *_: None))
    check(lambda net, body: body.register_full_backward_hook(lambda *_: None))
    check(lambda net, body: setattr(body.identity[0], "forward", lambda x: 2 * x))
    check(lambda net, body: setattr(body.point, "norm", nn.BatchNorm2d(4, track_running_stats=False).double()))
    check(lambda net, body: nn.utils.parametrizations.weight_norm(body.main.conv))
    check(lambda net, body: net.bfloat16(), image().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        check(lambda net, body: net.float(), image().float())
    rich = foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, bias=False), nn.BatchNorm2d(4)), "repvgg")
    rich.train()(image().float())
    plain = foldconv.RepVGG(moments=False)
    expanded(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), plain)(image())
    assert not calls
    rich = expanded(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        rich(image(1, 4, 1, 1))
    assert rich[0].body.point.norm.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
        rich(image(2, 3, 9, 9))


def test_branches_of_another_kind_run_beside_the_others(calls):
    rich = expanded(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    body = rich[0].body
    body.add_module("third", nn.Conv2d(4, 4, 1).double())
    body.add_module("fourth", nn.Identity())
    body.point.conv.bias = nn.Parameter(torch.ones(4).double())
    assert_same(rich, image())
    body.point.norm = nn.InstanceNorm2d(4)
    assert_same(rich, image())
    assert len(calls) == 4


def test_few_positions_for_the_channels(calls, monkeypatch):
    monkeypatch.setattr(_moments, "SLOWER", 1.25)
    monkeypatch.setattr(foldconv.ops._moments, "SMALL", 2**17)
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    assert_same(expanded(conv, nn.BatchNorm2d(256)), image(2, 256, 3, 3))
    assert not calls
    assert_same(expanded(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)), image(2, 8, 9, 9))
    assert len(calls) == 2
    monkeypatch.setattr(_moments, "FEW", 2**15)
    assert_same(expanded(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)), image(2, 8, 9, 9))
    assert len(calls) == 2


def test_copies_strips_and_dilated_kernels(calls):
    """Their maps are computed again backward."""
    geometries = [{"padding": 1}, {"padding": 1, "stride": 2}, {}, {"padding": 1, "groups": 4}, {"kernel_size": 1}]
    for method in ("mobileone", "acnet", "dbb"):
        for number, geometry in enumerate(geometries):
            conv = nn.Conv2d(4, 4, **{"kernel_size": 3, "bias": False} | geometry)
            if method == "mobileone" or conv.kernel_size != (1, 1):
                assert_same(expanded(conv, nn.BatchNorm2d(4), method), image(last=number == 1), number < 2)
    large = nn.Conv2d(4, 4, 7, padding=3, groups=4, bias=False)
    assert_same(expanded(large, nn.BatchNorm2d(4), "dilated"), image())
    wide = nn.Conv2d(4, 6, 1, stride=2, bias=False)
    assert_same(expanded(wide, nn.BatchNorm2d(6), "mobileone"), image())
    assert len(calls) == 2 * (len(geometries) + 1) + 2 * 3


def test_depthwise_convolutions_run_channels_last(monkeypatch):
    layouts, by_moments = [], _moments._by_moments

    def seen(block, x):
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return by_moments(block, x)

    monkeypatch.setattr(_moments, "_by_moments", seen)
    for geometry in ({"stride": 2}, {"kernel_size": 5, "padding": 2}):
        conv = nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1, "groups": 4, "bias": False} | geometry)
        rich, x = expanded(conv, nn.BatchNorm2d(4), "mobileone"), image()
        assert_same(rich, x, True)
        assert rich(x).is_contiguous()
    assert layouts == [True] * 6


def test_copies_are_one_convolution(calls, monkeypatch):
    """With inputs enough; the map of some is kept, where one is dear to compute."""
    found, add = [], _moments.add_copies
    monkeypatch.setattr(
        _moments, "add_copies", lambda *args, **named: found.append(len(args[2])) or add(*args, **named)
    )
    conv = nn.Conv2d(8, 4, 3, padding=1, bias=False)
    assert_same(expanded(conv, nn.BatchNorm2d(4, momentum=None), "mobileone"), image(3, 8, 7, 6), True)
    monkeypatch.setattr(foldconv.ops._moments, "SMALL", 2**17)
    assert_same(expanded(conv, nn.BatchNorm2d(4), "mobileone"), image(3, 8, 7, 6, last=True))
    assert found == [3] * 4
    monkeypatch.setattr(_moments, "SLOWER", 0)
    rich = expanded(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), "mobileone")
    rich[0].body.conv2.conv.weight.requires_grad_(False)
    assert_same(rich, image(3, 8, 7, 6), True)
    rich[0].body.conv2.norm.eps = 0.1
    rich[0].body.conv3.norm.register_parameter("bias", None)
    assert_same(rich, image(3, 8, 7, 6))
    assert found == [3] * 4 + [4] * 2 + [2] * 2


def test_windows_that_pad(monkeypatch):
    """DBB's last two branches: an average has no map, another window one."""
    found = []
    for name in ("add_average", "add_window_of_point"):
        add = getattr(_windows, name)
        monkeypatch.setattr(_windows, name, lambda *args, add=add, name=name: found.append(name) or add(*args))
    geometries = [
        {"padding": 1},
        {"padding": 1, "stride": 2, "kernel_size": 3},
        {"padding": (2, 0), "stride": (2, 1), "kernel_size": (3, 2)},
        {"padding": 1, "groups": 2},
    ]
    for number, geometry in enumerate(geometries):
        conv = nn.Conv2d(4, 6, **{"kernel_size": 3, "bias": False} | geometry)
        assert_same(expanded(conv, nn.BatchNorm2d(6), "dbb"), image(last=number % 2 == 0), number < 2)
    assert found == ["add_average", "add_window_of_point"] * 2 * len(geometries)
    conv = nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False)
    assert_same(expanded(conv, nn.BatchNorm2d(6), foldconv.DBB(internal_width=5)), image())
    assert_same(expanded(nn.Conv2d(4, 8, 3, padding=1, groups=4), None, "dbb"), image())
    assert_same(expanded(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6, momentum=None), "dbb"), image(3, 4, 9))
    assert_same(expanded(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6, affine=False), "dbb"), image(2, 4, 3, 4, 3))


def test_no_map_is_kept_for_the_branches():
    def kept(net, x):
        sizes = {}
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(x).sum().backward()
        return sum(size for where, (size, _) in sizes.items() if where not in own)

    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    rich = foldconv.expand(net, "repvgg").train()
    assert kept(rich, x) < 1.05 * kept(net.train(), x)
    assert kept(by_branches(rich), x) > 1.4 * kept(net, x)


def test_under_a_checkpoint():
    rich, x = expanded(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)), image()
    rich(x).square().sum().backward()
    expected = [p.grad for p in rich.parameters()]
    rich.zero_grad()
    checkpoint(rich, x, use_reentrant=False).square().sum().backward()
    for p, g in zip(rich.parameters(), expected):
        torch.testing.assert_close(p.grad, g, **CLOSE)


def test_decided_once(monkeypatch):
    asked, plan = [], _moments._plan
    monkeypatch.setattr(_moments, "_plan", lambda *args: asked.append(1) or plan(*args))
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double()
    block = foldconv.expand(net, "repvgg")[0].body.train()
    x = torch.randn(8, 4, 9, 9).double()
    branches = copy.deepcopy(block)
    branches.forward = lambda x: super(MomentSum, branches).forward(x)

    def check():
        torch.testing.assert_close(block(x), branches(x), rtol=1e-10, atol=1e-10)

    for _ in range(3):
        check()
    assert len(asked) == 1
    for b in (block, branches):  # a frozen norm, of which a plan that stayed would know nothing
        b.point.norm.eval()
        b.point.norm.running_var.fill_(3)
    check()
    assert len(asked) == 2
    for b in (block, branches):
        b.point.norm.train()
        b.main.conv.stride = b.point.conv.stride = (1, 2)
        del b.identity
    check()
    assert len(asked) == 3
    check()
    assert len(asked) == 3
