"""OREPA's loops compute what torch's operations compute, for every parameter and whatever the shape and layout."""

import copy

import pytest
import torch
from torch import nn

import foldconv
from foldconv import ops
from foldconv.errors import UnsupportedError
from foldconv.ops import _buffers, _orepa_cpu, _threads

pytest.importorskip("numba")

F64 = {"dtype": torch.float64}
# channels, size, groups: the product in the loop, and torch's (the last four)
SHAPES = [
    ((16, 32), (3, 3), 4),
    ((6, 6), (3, 3), 6),  # twice as wide inside
    ((5, 7), (2, 2), 1),
    ((3, 4), (7, 7), 1),
    ((2, 3), (3, 1, 2), 1),
    ((70, 66), (3, 1), 1),  # more than a block of inputs
    ((72, 140), (2,), 1),  # sums in chunks
    ((70, 68), (1, 2), 1),
    ((130, 4), (2, 1), 2),
]


def layer_of(channels, size, groups, dtype, **options):
    cls = {1: foldconv.OREPAConv1d, 2: foldconv.OREPAConv2d, 3: foldconv.OREPAConv3d}[len(size)]
    layer = cls(*channels, size, groups=groups, bias=False, dtype=dtype, **options)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def results(path, layer, grad):
    """The kernel and the gradients of all parameters."""
    wanted = [p for p in layer.parameters() if p.requires_grad]
    with ops.using(path):
        kernel = layer.kernel()
    return [kernel.detach(), *torch.autograd.grad(kernel, wanted, grad)]


def check_agreement(layer, tolerance, grad=None):
    grad = torch.randn_like(layer.weight) if grad is None else grad
    found, wanted = results("cpu", layer, grad), results("torch", layer, grad)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = max(1e-30, b.abs().max().item())
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance)
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_and_gradients(shape):
    for point in (True, False):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            layer = layer_of(*shape, dtype, point=point)
            check_agreement(layer, tolerance)
            layer.vector.data[1:4] = 0  # as a layer starts, but for two branches
            check_agreement(layer, tolerance)


def test_both_ways_of_the_product_are_among_the_shapes():
    found = set()
    for channels, size, groups in SHAPES:
        layer = layer_of(channels, size, groups, torch.float32)
        p = layer.branches._as_parameters(dict(layer.named_parameters()))
        plan = _orepa_cpu._plan(p, groups)
        found |= {("multiplies", plan.multiplies), ("chunks", plan.chunks > 1)}
    assert len(found) == 4


def test_any_layout():
    """Parameters and gradients that lie otherwise in memory, or share theirs."""
    for channels in ((6, 9), (70, 66)):
        layer = layer_of(channels, (3, 3), 1, **F64)
        wanted = check_agreement(layer, 1e-12)
        last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        assert not last.kxk_conv2.is_contiguous()
        grad = torch.randn_like(layer.weight).to(memory_format=torch.channels_last)
        assert torch.equal(check_agreement(last, 1e-12, grad)[0], wanted[0])
        check_agreement(layer, 1e-12, torch.ones((), **F64).expand_as(layer.weight))
        spread = torch.randn(*layer.vector.shape[::-1], 2, **F64)
        layer.vector = nn.Parameter(spread[..., 1].t())
        assert not layer.vector.is_contiguous()
        check_agreement(layer, 1e-12)


def test_only_what_learns_gets_a_gradient():
    layer = layer_of((4, 6), (3, 3), 1, **F64)
    everything = check_agreement(layer, 1e-12)[0]
    for name, p in layer.named_parameters():
        p.requires_grad_(name in ("kxk_idconv1", "vector"))
    with ops.using("cpu"):
        kernel = layer.kernel()
    assert torch.equal(kernel, everything)
    kernel.sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"kxk_idconv1", "vector"}
    check_agreement(layer, 1e-12)
    with ops.using("cpu"):
        assert not layer.requires_grad_(False).kernel().requires_grad


def test_other_tensors_between_forward_and_backward_are_refused():
    """The loops would compute addresses from the shapes of others."""
    layer = layer_of((4, 6), (3, 3), 1, torch.float32)
    with ops.using("cpu"):
        kernel = layer.kernel()
    layer.avg_conv.data = torch.zeros(1, 1, 1, 1)
    with pytest.raises(UnsupportedError, match="between the forward and the backward"):
        kernel.sum().backward()


def test_gradients_of_gradients():
    layer = layer_of((2, 3), (2, 1), 1, **F64)
    with ops.using("cpu"):
        assert torch.autograd.gradcheck(lambda *_: layer.kernel(), tuple(layer.parameters()))
        assert torch.autograd.gradgradcheck(lambda *_: layer.kernel(), tuple(layer.parameters()))


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    layer = layer_of((128, 230), (3, 3), 1, torch.float32)
    assert layer.weight.numel() >= _threads.LEAST_OF_TWO, "large enough for two threads"
    grad, before, found = torch.randn_like(layer.weight), torch.get_num_threads(), []
    product = torch.bmm

    def on_one_thread(a, b, out):  # torch's products are another matter
        number = torch.get_num_threads()
        torch.set_num_threads(1)
        product(a, b, out=out)
        torch.set_num_threads(number)

    monkeypatch.setattr(torch, "bmm", on_one_thread)
    p = layer.branches._as_parameters({name: p.detach() for name, p in layer.named_parameters()})
    for number in (1, 2, 3):
        try:
            torch.set_num_threads(number)
            found.append([_orepa_cpu.orepa(p, 1), *_orepa_cpu.orepa_gradients(grad, p, 1)[:-1]])
        finally:
            torch.set_num_threads(before)
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_shapes_that_do_not_fit_are_refused():
    layer = layer_of((4, 6), (3, 3), 2, torch.float32)
    p = layer.branches._as_parameters({name: p.detach() for name, p in layer.named_parameters()})
    assert ops.compose_orepa(p, 2).shape == layer.weight.shape
    for field in ("average", "prior", "inner", "second", "point", "depthwise", "pointwise", "scales", "cosines"):
        for cut in (getattr(p, field)[1:], getattr(p, field)[:, 1:]):
            with pytest.raises(UnsupportedError, match="expected shape"):
                ops.compose_orepa(p._replace(**{field: cut}), 2)


def test_a_step_keeps_the_parameters_alone_and_takes_no_new_memory(monkeypatch):
    layer = layer_of((72, 72), (3, 3), 1, torch.float32)
    kept = []
    pack = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), layer.branches.prior(layer.weight))}
    with pack:
        layer.kernel().sum().backward()
    assert {t.untyped_storage().data_ptr() for t in kept} == own
    fresh, original = [], _buffers.np.empty
    monkeypatch.setattr(_buffers.np, "empty", lambda size, dtype: fresh.append(size) or original(size, dtype))
    for _ in range(3):
        layer.zero_grad()
        layer.kernel().sum().backward()
        counted = len(fresh)
    layer.zero_grad()
    layer.kernel().sum().backward()
    assert len(fresh) == counted


def test_what_is_not_finite_shows():
    layer = layer_of((4, 6), (3, 3), 1, torch.float32)
    layer.weight.data[3, 2, 1, 1] = torch.nan
    with ops.using("cpu"):
        kernel = layer.kernel()
    bad = ~kernel.isfinite()
    assert bad[3, 2, 1, 1]
    assert bad.sum() == 1, "and nowhere else"
