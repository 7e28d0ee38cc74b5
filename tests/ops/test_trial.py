"""A path on trial: compared with torch once for each kind of tensors, and gone, with one warning, when it is wrong."""

import types

import pytest
import torch

import foldconv
from foldconv import ops
from foldconv.ops import _cpu, _paths, _trial
from foldconv.ops._torch import Orepa
from foldconv.ops._trial import Trial


def honest():
    """A path that is right, and counts its calls."""
    calls = []

    def noted(name, grad=False):
        def call(*arguments):
            calls.append(name)
            first, *fields, groups = arguments if grad else (None, *arguments)
            fields = tuple(fields[0]) if name.startswith("orepa") else tuple(fields)
            return _trial._by_torch(name.removesuffix("_gradients"), fields, groups, first)

        return call

    path = types.SimpleNamespace(name="gpu", least=lambda *_: 0, reason_against=lambda *_: None, calls=calls)
    for name in ("depthwise", "orepa"):
        setattr(path, name, noted(name))
        setattr(path, f"{name}_gradients", noted(f"{name}_gradients", grad=True))
    return path


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(6, 4, 3, 3, dtype=dtype, requires_grad=True), torch.randn(
        4, 9, 9, dtype=dtype, requires_grad=True
    )


def branches():
    torch.manual_seed(0)
    pair, taps = torch.randn(6, 4), torch.randn(6, 4, 9)
    product, depthwise = torch.randn(6, 4, 9), torch.randn(4, 8, 9)
    fields = (taps, pair, pair + 1, product, pair - 1, torch.randn(6, 4, 8), depthwise, torch.randn(6, 6))
    return Orepa(*(t.requires_grad_() for t in fields), torch.randn(6, 9), 4)


@pytest.fixture
def on_trial(monkeypatch):
    """Puts a path on trial, as the first that is tried."""

    def put(path):
        trial = Trial(path)
        monkeypatch.setattr(_paths, "_FAST", (trial, _cpu))
        return trial

    monkeypatch.setattr(_paths, "_decisions", {})
    return put


def step(compose, *parameters):
    kernel = compose(*parameters)
    return kernel, *torch.autograd.grad(kernel.square().sum(), [p for p in parameters if p.requires_grad])


def by_torch(compose, *parameters):
    with ops.using("torch"):
        return step(compose, *parameters)


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_right_is_compared_once_for_each_kind(on_trial, monkeypatch):
    path = honest()
    trial, compared, fault = on_trial(path), [], _trial._fault
    monkeypatch.setattr(_trial, "_fault", lambda *a: compared.append(a[1]) or fault(*a))
    for _ in range(3):
        same(step(ops.compose_depthwise, *tensors()), by_torch(ops.compose_depthwise, *tensors()))
    assert compared == ["depthwise", "depthwise"]  # forward and backward
    assert len(path.calls) == 6
    step(ops.compose_depthwise, *tensors(torch.float64))
    ops.compose_orepa(branches()).sum().backward()
    assert compared == ["depthwise"] * 4 + ["orepa"] * 2
    assert trial.failure is None


@pytest.mark.parametrize("what", ["depthwise", "depthwise_gradients", "orepa", "orepa_gradients"])
def test_what_is_wrong_steps_aside_with_one_warning(what, on_trial):
    path = honest()
    right = getattr(path, what)

    def wrong(*arguments):
        found = right(*arguments)
        # One element, by a hundredth: nothing that training would show.
        broken = found[-3 if what == "orepa_gradients" else -1] if isinstance(found, tuple) else found
        broken[(-1,) * broken.dim()] += 0.01 * broken.abs().max()
        return found

    setattr(path, what, wrong)
    trial = on_trial(path)

    def compose(*parameters):
        if what.startswith("depthwise"):
            return ops.compose_depthwise(*parameters)
        return ops.compose_orepa(Orepa(*parameters, *branches()[-2:]))

    parameters = tensors() if what.startswith("depthwise") else branches()[:8]
    pattern = (
        r"path 'gpu' computed a wrong (kernel|gradient) .* Please report .* FOLDCONV_PATH=torch leaves the path out"
    )
    with pytest.warns(RuntimeWarning, match=pattern) as seen:
        found = step(compose, *parameters)
    assert len(seen) == 1
    same(found, by_torch(compose, *parameters))
    calls = len(path.calls)
    same(step(compose, *parameters), by_torch(compose, *parameters))
    assert len(path.calls) == calls, "it is not asked again"
    assert "stepped aside" in ops.why(*tensors())
    assert trial.reason_against() is not None
    _paths._decisions.clear()
    with ops.using("gpu"), pytest.raises(foldconv.UnsupportedError, match="it stepped aside: computed a wrong"):
        ops.compose_depthwise(*tensors())


def test_what_does_not_start_steps_aside(on_trial):
    path = honest()

    def fail(*arguments):
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")

    path.depthwise = fail
    on_trial(path)
    with pytest.warns(
        RuntimeWarning, match=r"did not run \(RuntimeError: PTX was compiled with an unsupported toolchain\)"
    ):
        found = step(ops.compose_depthwise, *tensors())
    same(found, by_torch(ops.compose_depthwise, *tensors()))


def test_a_diverged_run_is_no_fault_of_the_path(on_trial):
    trial = on_trial(honest())
    taps, D = tensors()
    taps.data[0, 0, 0, 0] = torch.nan
    assert not ops.compose_depthwise(taps, D).isfinite().all()
    assert trial.failure is None


def test_memory_that_is_short_is_no_fault_of_the_path(on_trial):
    path = honest()

    def fail(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    path.depthwise = fail
    trial = on_trial(path)
    with pytest.raises(torch.OutOfMemoryError):
        ops.compose_depthwise(*tensors())
    assert trial.failure is None


def test_the_path_of_a_process(python):
    code = "import torch; from foldconv import ops; print(ops.why(torch.zeros(64, 64, 9), torch.zeros(64, 9, 9)))"

    assert python(code, FOLDCONV_PATH="torch").stdout == "torch: asked for by FOLDCONV_PATH\n"
    wrong = python(code, FOLDCONV_PATH="tpu").stderr
    assert "FOLDCONV_PATH: expected one of gpu, cpu, blocks, torch, received 'tpu'" in wrong


def test_the_gpus_path_is_on_trial():
    assert isinstance(_paths._FAST[0], Trial)
    assert _paths._FAST[0].name == "gpu"
