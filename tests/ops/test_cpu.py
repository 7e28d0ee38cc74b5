"""The CPU's path computes what torch's operations compute, whatever the shape, layout, dtype and number of threads."""

import math

import pytest
import torch
from torch import nn

import foldconv
from foldconv import ops
from foldconv.ops import _buffers, _cpu, _threads

pytest.importorskip("numba")

F64 = {"dtype": torch.float64}
# inputs, outputs, groups, taps, taps of W
SHAPES = [
    (16, 32, 1, 9, 9),
    (70, 66, 1, 9, 9),  # more than a block of inputs, sums in chunks
    (16, 32, 4, 9, 12),
    (6, 6, 6, 9, 9),
    (5, 7, 1, 2, 2),
    (1, 9, 1, 3, 4),
    (6, 10, 2, 25, 25),
]


def close(received, wanted, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    scale = max(1e-30, wanted.abs().max().item())
    torch.testing.assert_close(received / scale, wanted / scale, rtol=0, atol=tolerance)


def by_both(compose, parameters, shape, dtype):
    """Result and gradients by the CPU's path, then by torch's operations."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = []
    for path in ("cpu", "torch"):
        with ops.using(path):
            kernel = compose(*parameters)
        found.append((kernel.detach(), *torch.autograd.grad(kernel, parameters, grad)))
    return zip(*found, strict=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("last", [False, True], ids=["taps_last", "inputs_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depthwise(shape, last, dtype):
    inputs, outputs, groups, k, multiplier = shape
    taps = torch.randn(outputs, inputs // groups, multiplier, dtype=dtype)
    if last:
        taps = taps.transpose(1, 2).contiguous().transpose(1, 2)
    D = torch.randn(inputs, k, multiplier, dtype=dtype)
    parameters = [taps.requires_grad_(), D.requires_grad_()]
    compared = by_both(lambda *p: ops.compose_depthwise(*p, groups), parameters, (outputs, inputs // groups, k), dtype)
    for received, wanted in compared:
        close(received, wanted, dtype)


def test_gradients_of_gradients():
    taps, D = torch.randn(4, 3, 4, **F64, requires_grad=True), torch.randn(3, 4, 4, **F64, requires_grad=True)
    with ops.using("cpu"):
        assert torch.autograd.gradgradcheck(ops.compose_depthwise, (taps, D))


def test_the_number_of_threads_changes_no_bit(threads):
    taps, D = torch.randn(256, 128, 9), torch.randn(128, 9, 9)
    assert taps.numel() >= _threads.LEAST_OF_TWO, "large enough for two threads"
    found = []
    for number in (1, 2, 3):
        threads(number)
        found.append((_cpu.depthwise(taps, D, 1), *_cpu.depthwise_gradients(taps, taps, D, 1)))
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("openmp", [True, False])
def test_every_thread_does_its_part_and_errors_arrive(threads, monkeypatch, openmp):
    threads(2)
    if not openmp:
        monkeypatch.setattr(_threads, "_openmp", lambda: None)
    seen = []
    _threads.run(lambda me, all: seen.append((me, all)), _threads.LEAST_OF_TWO)
    assert sorted(seen) == [(0, 2), (1, 2)]

    def fail(me, all):
        if me == 1:
            raise ValueError("the second thread's")

    with pytest.raises(ValueError, match="the second thread's"):
        _threads.run(fail, _threads.LEAST_OF_TWO)
    seen.clear()
    _threads.run(lambda me, all: seen.append((me, all)), 1)
    assert seen == [(0, 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value):
    taps, D = torch.randn(8, 4, 9), torch.zeros(4, 9, 9)
    taps[3, 2, 5] = value
    kernel = _cpu.depthwise(taps, D, 1)
    assert not kernel[3, 2].isfinite().all()
    kernel[3, 2] = 0
    assert kernel.isfinite().all(), "and nowhere else"
    assert not _cpu.depthwise_gradients(torch.ones_like(taps), taps, D, 1)[1].isfinite().all()


# ---------------------------------------------------------------------- memory


def test_memory_comes_back_when_the_last_tensor_dies():
    _buffers.release()
    shape = (1 << 17,)
    first = _buffers.empty(shape, torch.float32)
    view, where = first[5:], first.data_ptr()
    assert where % _buffers.ALIGNMENT == 0
    del first
    other = _buffers.empty(shape, torch.float32)
    assert other.data_ptr() != where, "a view still holds it"
    del view
    assert _buffers.empty(shape, torch.float32).data_ptr() == where
    del other
    assert _buffers.release() == 2 * 4 * shape[0]
    assert _buffers.release() == 0


def test_little_memory_is_kept(monkeypatch):
    _buffers.release()
    monkeypatch.setattr(_buffers, "MOST_KEPT", 1 << 19)
    tensors = [_buffers.empty((1 << 17,), torch.float32) for _ in range(3)]
    del tensors
    assert _buffers.release() == 1 << 19


def test_a_step_in_steady_state_takes_no_new_memory(monkeypatch):
    fresh = []
    original = _buffers.np.empty
    monkeypatch.setattr(_buffers.np, "empty", lambda size, dtype: fresh.append(size) or original(size, dtype))
    net = foldconv.expand(nn.Sequential(nn.Conv2d(96, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3)), "doconv").train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    counts = []
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(2, 96, 7, 7)).sum().backward()
        optimizer.step()
        counts.append(len(fresh))
    assert counts[0] > 0
    assert counts[1] == counts[-1]


def test_the_gradient_is_handed_over_without_a_copy():
    layer = foldconv.expand(nn.Conv2d(96, 96, 3), "doconv").train()
    layer(torch.randn(1, 96, 5, 5)).sum().backward()
    loans = {memory.ctypes.data for _, memory in _buffers._loans.values()}
    assert layer.weight.grad.data_ptr() in loans
