"""The path of the GPU: in Triton's interpreter everywhere, on the GPU itself where there is one.

Triton decides when it is imported whether it interprets, so the interpreted tests are this file again, in a process of
their own. That the compiler takes the kernels, too, needs no GPU either.
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.ops import _gpu, _torch, compose_depthwise, compose_orepa, using
from foldconv.ops._torch import Orepa

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
FIELDS = ("weight", "average", "prior", "product", "point", "pointwise", "depthwise", "scales")
PRECISION = {torch.float32: 1e-6, torch.float64: 1e-12}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="Triton interprets")
needs_device = pytest.mark.skipif(DEVICE is None, reason="run by test_everything_in_the_interpreter")


@needs_triton
@needs_compiler
def test_everything_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "not importing and not benchmark",
    ]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 4 * (len(DEPTHWISE) + len(OREPA))  # both layouts and dtypes: they ran, none was skipped


# ---------------------------------------------------------------------- against torch's operations

# outputs and inputs of a group, k, S, groups: odd sizes, S > k, many groups, more than one program and chunk
DEPTHWISE = [
    (5, 1, 2, 2, 1),
    (6, 7, 3, 5, 2),
    (5, 3, 4, 4, 1),
    (17, 5, 9, 9, 1),
    (1, 1, 9, 9, 6),
    (17, 6, 9, 11, 2),
    (3, 2, 25, 25, 1),
    (2, 3, 49, 50, 1),
]
# ..., with the 1x1 branch
OREPA = [
    (5, 1, 2, 1, True),
    (6, 7, 3, 2, False),
    (5, 3, 4, 1, True),
    (17, 5, 9, 1, True),
    (1, 1, 9, 6, True),
    (16, 6, 9, 2, True),
    (3, 2, 25, 1, False),
    (2, 150, 2, 1, True),
    (2, 3, 49, 1, True),
]
layouts = pytest.mark.parametrize("last", [False, True], ids=["taps", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", list(PRECISION), ids=["float32", "float64"])


def draw(*shape, dtype, last=False):
    tensor = torch.randn(shape, dtype=dtype, device=DEVICE)
    if last:
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.requires_grad_()


def branches(out, per_group, k, groups, point, dtype, last=False):
    pair = (groups * out, per_group)
    return Orepa(
        draw(*pair, k, dtype=dtype, last=last),
        draw(*pair, dtype=dtype),
        draw(*pair, dtype=dtype),
        draw(*pair, k, dtype=dtype, last=not last),
        draw(*pair, dtype=dtype) if point else None,
        draw(*pair, 8, dtype=dtype),
        draw(groups * per_group, 8, k, dtype=dtype),
        draw(5 + point, groups * out, dtype=dtype),
        draw(groups * out, k, dtype=dtype).detach(),
        (k - 1) // 2,
    )


def compare(compose, reference, inputs, names):
    """The kernel and every gradient, against the reference in double precision."""
    dtype = inputs[0].dtype
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with using("gpu"):
        found = compose(*inputs)
    expected = reference(*exact)
    grad = torch.randn_like(found)
    found_all = [found, *torch.autograd.grad(found, inputs, grad)]
    expected_all = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for name, x, y in zip(["kernel", *names], found_all, expected_all, strict=True):
        assert x.dtype == dtype
        assert x.shape == y.shape
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error < PRECISION[dtype], f"{name}: off by {error:.1e}"
    return found_all


@needs_device
@needs_triton
@dtypes
@layouts
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_is_torchs(case, last, dtype):
    torch.manual_seed(0)
    out, per_group, k, multiplier, groups = case
    taps = draw(groups * out, per_group, multiplier, dtype=dtype, last=last)
    D = draw(groups * per_group, k, multiplier, dtype=dtype)
    kernel, d_taps, _ = compare(
        lambda *t: compose_depthwise(*t, groups), lambda *t: _torch.depthwise(*t, groups), (taps, D), ("taps", "D")
    )
    for result in (kernel, d_taps):
        assert (result.transpose(1, 2) if last else result).is_contiguous()


@needs_device
@needs_triton
@dtypes
@layouts
@pytest.mark.parametrize("case", OREPA, ids=str)
def test_orepa_is_torchs(case, last, dtype):
    torch.manual_seed(0)
    groups = case[3]
    p = branches(*case, dtype=dtype, last=last)
    names = [name for name in FIELDS if getattr(p, name) is not None]

    def all_of(tensors):
        double = tensors[0].dtype == torch.float64
        return p._replace(cosines=p.cosines.double() if double else p.cosines, **dict(zip(names, tensors, strict=True)))

    kernel, d_weight, *_ = compare(
        lambda *t: compose_orepa(all_of(t), groups),
        lambda *t: _torch.orepa(all_of(t), groups),
        [getattr(p, name) for name in names],
        names,
    )
    for result in (kernel, d_weight):
        assert (result.transpose(1, 2) if last else result).is_contiguous()


@needs_device
@needs_triton
def test_whatever_the_strides():
    torch.manual_seed(0)
    taps, D = torch.randn(3, 8, 10, device=DEVICE)[:, ::2, 1:], torch.randn(9, 5, 9, device=DEVICE).transpose(0, 1)
    p = branches(4, 3, 4, 1, True, torch.float32)
    p = p._replace(
        weight=p.weight.detach().flip(0).expand(4, 3, 4)[:, :, ::2],
        product=torch.randn(4, 3, 1, device=DEVICE).expand(4, 3, 2),
        depthwise=p.depthwise.detach()[:, :, ::2],
        cosines=p.cosines[:, ::2],
        average=p.average.detach().t().contiguous().t(),
        centre=0,
    )
    with using("gpu"):
        found, composed = _gpu.depthwise(taps[:, :4], D[:4], 1), _gpu.orepa(p, 1)
        grad = torch.ones((), device=DEVICE).expand(composed.shape)
        gradients = _gpu.orepa_gradients(grad, p, 1)
    assert torch.allclose(found, _torch.depthwise(taps[:, :4], D[:4], 1), atol=1e-5)
    assert torch.allclose(composed, _torch.orepa(p, 1), atol=1e-5)
    assert torch.allclose(gradients.product, p.scales[3, :, None, None].expand(4, 3, 2))


# ---------------------------------------------------------------------- how it runs


@contextlib.contextmanager
def launches(monkeypatch):
    names, launch = [], _gpu._launch

    def noted(kernel, *arguments, **constants):
        names.append(kernel.__name__)
        launch(kernel, *arguments, **constants)

    with monkeypatch.context() as patch:
        patch.setattr(_gpu, "_launch", noted)
        yield names


@needs_device
@needs_triton
def test_launches(monkeypatch):
    net = nn.Conv2d(4, 6, 3).to(DEVICE)
    layer = foldconv.expand(net, "doconv")
    with launches(monkeypatch) as names, using("gpu"):
        kernel = layer.kernel()
        assert names == ["depthwise"]
        kernel.sum().backward()
        assert names == ["depthwise", "outer"]
    with launches(monkeypatch) as names, using("gpu"):
        kernel = compose_orepa(branches(5, 3, 9, 1, True, torch.float32))
        assert names == ["orepa"]
        kernel.sum().backward()
        assert names == ["orepa", "orepa_rows", "outer"]


@needs_device
@needs_triton
def test_two_runs_are_equal_to_the_bit():
    torch.manual_seed(0)
    taps, D = draw(24, 3, 9, dtype=torch.float32), draw(3, 9, 9, dtype=torch.float32)
    p = branches(24, 3, 9, 1, True, torch.float32)
    inputs = [taps, D, *(t for t in p[:8])]
    runs = []
    for _ in range(2):
        with using("gpu"):
            kernel = compose_depthwise(taps, D) * compose_orepa(p)
        runs.append([kernel, *torch.autograd.grad(kernel.sum(), inputs)])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@needs_device
@needs_triton
def test_a_layer_takes_it():
    torch.manual_seed(0)
    layer = foldconv.expand(nn.Conv2d(4, 6, 3, groups=2).to(DEVICE), foldconv.DOConv(depth_multiplier=10))
    nn.init.normal_(layer.D)
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    found = {}
    for path in ("gpu", "torch"):
        with using(path):
            y = layer(x)
            found[path] = [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    # A gradient's gradient is that of torch's operations.
    with using("gpu"):
        (first,) = torch.autograd.grad(layer(x).square().sum(), layer.D, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), layer.weight)[0]
    with using("torch"):
        (first,) = torch.autograd.grad(layer(x).square().sum(), layer.D, create_graph=True)
        assert torch.allclose(second, torch.autograd.grad(first.square().sum(), layer.weight)[0], rtol=1e-3)


@needs_device
@needs_triton
def test_what_it_does_not_take():
    half = torch.zeros(2, 2, 4, device=DEVICE).bfloat16()
    with using("gpu"), pytest.raises(UnsupportedError, match=r"path 'gpu' cannot be taken: torch\.bfloat16 has no"):
        compose_depthwise(half, half)


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets")
def test_tensors_on_the_cpu_are_not_for_it(monkeypatch):
    x = torch.zeros(2, 2, 4)
    assert _gpu.reason_against(x) == "the tensors are on cpu"
    with using("gpu"), pytest.raises(UnsupportedError, match="path 'gpu' cannot be taken: the tensors are on cpu"):
        compose_depthwise(x, x)
    # Somebody who debugs kernels of their own does not want ours interpreted.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _gpu.reason_against(x) == "the tensors are on cpu"
    assert foldconv.explain(foldconv.expand(nn.Conv2d(2, 2, 3), "doconv")).find("gpu: ") == -1


class OnGPU:
    """What a rule sees of a tensor on a GPU that is not there."""

    device = torch.device("cuda", 0)
    dtype = torch.float32

    def __init__(self, elements=8):
        self.elements = elements

    def numel(self):
        return self.elements


def test_which_gpus(monkeypatch):
    monkeypatch.setattr(_gpu, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_gpu, "_capability", lambda index: (9, 0))
    assert _gpu.reason_against(OnGPU()) is None
    assert _gpu.reason_against(OnGPU(), OnGPU(2**31)) == "a tensor has 2³¹ elements or more"
    monkeypatch.setattr(_gpu, "_capability", lambda index: (7, 5))
    assert _gpu.reason_against(OnGPU()) == "the GPU's compute capability is below 8.0"
    monkeypatch.setattr(_gpu, "_has_triton", lambda: False)
    assert _gpu.reason_against(OnGPU()) == "Triton is not installed (pip install triton)"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert _gpu.reason_against(OnGPU()) == "its kernels were not tried on ROCm"


def test_importing_foldconv_imports_no_triton(python):
    code = "import sys, foldconv, foldconv.ops; foldconv.DOConv2d; sys.exit('triton' in sys.modules)"
    assert python(code).returncode == 0


def test_the_benchmark_says_that_it_needs_a_gpu(tmp_path):
    pytest.importorskip("torchvision")
    script, out = Path(__file__).parents[2] / "benchmarks" / "gpu.py", tmp_path / "gpu.json"
    command, environment = [sys.executable, script, "--out", out], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr
        == "gpu.py: torch finds no GPU with CUDA here, and this measures nothing else; --dry tries it on the CPU\n"
    )
    assert not out.exists()


# ---------------------------------------------------------------------- how the work is cut


@pytest.mark.parametrize(
    "shape", [(1, 512, 512, 9), (1, 64, 64, 9), (1, 256, 256, 9), (1, 2048, 512, 9), (32, 16, 16, 9)]
)
def test_there_is_work_for_every_multiprocessor(shape):
    groups, out, per_group, k = shape
    tile = _gpu._tile_of_chunks(groups, out, per_group * k, k)
    assert tile.grid * tile.chunks >= 132
    assert tile.grid == groups * tile.blocks
    assert tile.blocks * tile.wide >= per_group * k
    assert 1 <= tile.chunks <= out
    rows = _gpu._tile_of_rows(groups, out, per_group * k, 16)
    assert rows.grid * rows.second >= 132
    assert rows.second * rows.rows >= out


# ---------------------------------------------------------------------- the compiler


def compiled(kernel, tile, first, *arguments, capability, **constants):
    """The kernel as it would be compiled for this launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, attributes, values = dict.fromkeys(constants, "constexpr"), {}, dict(constants)
    for place, (name, value) in enumerate(zip(kernel.arg_names, (first, *arguments))):
        if isinstance(value, torch.Tensor):
            signature[name] = {torch.float32: "*fp32", torch.float64: "*fp64"}[value.dtype]
        elif value == 1:
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": tile.warps, "enable_fp_fusion": True}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("capability", "dtype", "last"), [(90, torch.float32, False), (90, torch.float64, True), (80, torch.float32, True)]
)
def test_the_compiler_takes_the_kernels(capability, dtype, last, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = []
    monkeypatch.setattr(_gpu, "_launch", lambda *a, **c: built.append(compiled(*a, capability=capability, **c)))
    taps = torch.zeros(64, 64, 9, dtype=dtype)
    if last:
        taps = taps.transpose(1, 2).contiguous().transpose(1, 2)
    D = torch.zeros(64, 9, 9, dtype=dtype)
    pair = torch.zeros(64, 64, dtype=dtype)
    p = Orepa(taps, pair, pair, taps, pair, taps[:, :, :8], D[:, :8], pair[:6], pair[:, :9], 4)
    kernel = _gpu.depthwise(taps, D, 1)
    _gpu.depthwise_gradients(kernel, taps, D, 1)
    _gpu.orepa(p, 1)
    _gpu.orepa_gradients(kernel, p, 1)
    assert [b.name for b in built] == ["depthwise", "outer", "orepa", "orepa_rows", "outer"]
    for b in built:
        assert len(b.asm["cubin"]) > 1000
        # Sums by atomics would come out differently in every run; local memory means that registers do not suffice.
        assert not re.findall(r"(?:\b(?:atom|red)|\.local)\..*", b.asm["ptx"])
    # In the loop over outputs of DO-Conv's gradients, threads need nothing from each other.
    assert "shfl" not in built[1].asm["ptx"]
    assert "bar.sync" not in built[1].asm["ptx"]
