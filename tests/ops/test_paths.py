"""The rule that picks a path: what it picks, that it says why, and that compilers see torch's operations."""

import pytest
import torch
from torch import nn

import foldconv
from foldconv import ops
from foldconv.errors import install
from foldconv.ops import _autograd, _cpu, _threads

LARGE, SMALL = (64, 64, 9), (4, 4, 4)


def tensors(shape, **options):
    return torch.randn(shape, **options), torch.randn(shape[1], shape[2], shape[2], **options)


def name(*tensors):
    path = ops.choose(*tensors)
    return "torch" if path is None else path.name


def test_large_kernels_on_the_cpu_take_its_path():
    pytest.importorskip("numba")
    assert name(*tensors(LARGE)) == "cpu"
    assert name(*tensors(SMALL)) == "torch"
    with ops.using("cpu"):
        assert name(*tensors(SMALL)) == "cpu"
    with ops.using("torch"):
        assert name(*tensors(LARGE)) == "torch"
    usual = 4, 4, 9  # its loops are compiled for the others anyway
    assert name(*tensors(usual)) == "cpu"
    assert name(*tensors(usual, dtype=torch.float64)) == "torch"


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (lambda: tensors(LARGE, dtype=torch.bfloat16), "bfloat16 is not compiled"),
        (lambda: tensors(LARGE, device="meta"), "on meta"),
        (lambda: (torch.randn(64, 64, 49), torch.randn(64, 49, 49)), "more than 32 taps"),
        (lambda: (torch.randn(LARGE), torch.randn(64, 9, 9, dtype=torch.float64)), "differ in device or dtype"),
        (lambda: (torch.randn(0, 64, 9), torch.randn(64, 9, 9)), "empty"),
    ],
)
def test_what_the_path_cannot_take_goes_to_others(others, reason):
    assert name(*others()) == ("blocks" if "taps" in reason else "torch")
    with ops.using("cpu"), pytest.raises(foldconv.UnsupportedError, match=reason):
        ops.choose(*others())


def test_without_numba_or_in_a_forked_process(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_cpu, "_has_numba", lambda: False)
        assert name(*tensors(LARGE)) == "blocks"
        assert install("cpu") in ops.why(*tensors(LARGE))
    monkeypatch.setattr(_cpu, "_has_numba", lambda: True)
    assert name(*tensors(LARGE)) == "cpu"
    monkeypatch.setattr(_cpu, "_PROCESS", -1)
    assert name(*tensors(LARGE)) == "blocks"


def test_unknown_paths_are_named():
    with pytest.raises(foldconv.UnsupportedError, match="expected one of gpu, cpu, blocks, torch, received 'tpu'"):
        ops.using("tpu").__enter__()


@pytest.mark.parametrize("method", ["doconv", "orepa"])
def test_compilers_and_transforms_see_torchs_operations(method, monkeypatch):
    """The fast path would break a graph; under a compiler it must not even be asked."""
    torch.manual_seed(0)
    layer = foldconv.expand(nn.Conv2d(64, 64, 3, padding=1), method).train()
    x = torch.randn(1, 64, 5, 5)
    wanted = layer(x)

    for function in ("_Depthwise", "_Orepa"):
        monkeypatch.delattr(_autograd, function)  # every path is taken by one of these
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)
    parameters = dict(layer.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(parameters)
    with ops.using("torch"):
        found = torch.autograd.grad(layer(x).sum(), list(parameters.values()))
    for received, expected in zip(gradients.values(), found, strict=True):
        torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-5)


def test_one_pass_for_the_kernel_and_one_for_each_gradient(monkeypatch):
    """DO-Conv on the CPU's path: one loop forward, one for each gradient."""
    pytest.importorskip("numba")
    loops = []
    original = _cpu.run
    monkeypatch.setattr(_cpu, "run", lambda loop, *a: loops.append(loop) or original(loop, *a))
    layer = foldconv.expand(nn.Conv2d(192, 192, 3), "doconv").train()
    assert layer.weight.numel() >= _threads.LEAST_OF_TWO, "large enough for several threads"
    y = layer(torch.randn(1, 192, 5, 5))
    assert len(loops) == 1
    y.sum().backward()
    assert len(loops) == 3
