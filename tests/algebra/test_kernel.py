"""Each operation of the algebra against running the layers, and every refusal with its reason."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foldconv import UnsupportedError
from foldconv.algebra import Kernel

from .trees import MODES

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


def kernel(out=4, per_group=4, size=(3, 3), bias=True, **geometry):
    return Kernel(randn(out, per_group, *size), randn(out) if bias else None, **geometry)


def image(channels=4, size=(9, 10)):
    return randn(2, channels, *size)


@st.composite
def kernels(draw):
    """Any kernel at all: uneven and negative padding, transposed or not."""
    ndim = draw(st.integers(1, 2))
    transposed = draw(st.booleans())
    low = -1 if not transposed else -2
    groups = draw(st.sampled_from([1, 2]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 99)))
        size = draw(st.tuples(*[st.integers(1, 4)] * ndim))
        return kernel(
            4,
            4 // groups,
            size,
            bias=draw(st.booleans()),
            groups=groups,
            stride=draw(st.tuples(*[st.integers(1, 3)] * ndim)),
            dilation=draw(st.tuples(*[st.integers(1, 3)] * ndim)),
            padding=draw(st.tuples(*[st.tuples(st.integers(low, 3), st.integers(low, 3))] * ndim)),
            padding_mode="zeros" if transposed else draw(st.sampled_from(MODES)),
            transposed=transposed,
        )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(kernels())
def test_every_kernel_becomes_a_module(k):
    # Room for the window when gathering, for the cropping when scattering.
    x = image(4, (17, 16)[: k.ndim])
    torch.testing.assert_close(k.to_module()(x), k(x), **CLOSE)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(kernels(), st.data())
def test_addition_of_any_two_of_one_length(a, data):
    b = data.draw(kernels().filter(lambda k: k.ndim == a.ndim))
    b = b.replace(stride=a.stride, transposed=a.transposed, padding_mode=a.padding_mode)
    # The second's padding is moved so that its output has the first's length, for every input length.
    sign = -1 if a.transposed else 1
    padding = tuple((before, after + sign * (g - h)) for (before, after), g, h in zip(b.padding, a.growth, b.growth))
    b = b.replace(padding=padding)
    x = image(4, (40, 41)[: a.ndim])
    torch.testing.assert_close(a.add(b)(x), a(x) + b(x), **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_chain_with_pointwise_on_either_side(mode, groups, stride):
    padded = kernel(4, 4 // groups, groups=groups, padding=((1, 2), (0, 1)), padding_mode=mode, stride=(stride, 1))
    point = kernel(6, 2, (1, 1), groups=2)
    x = image()
    torch.testing.assert_close(padded.then(point)(x), point(padded(x)), **CLOSE)
    before = kernel(4, 4, (1, 1), bias=mode != "zeros")
    torch.testing.assert_close(before.then(padded)(x), padded(before(x)), **CLOSE)


def test_chain_of_spatial_kernels_flips_the_second():
    first, second = kernel(6, 4, (3, 2), padding=((2, 2), (2, 2))), kernel(5, 6, (2, 3), dilation=(2, 1))
    x = image()
    torch.testing.assert_close(first.then(second)(x), second(first(x)), **CLOSE)
    assert first.then(second).size == (5, 4)


def test_circular_kernels_of_one_length_chain():
    a, b = (kernel(padding=((1, 1), (1, 1)), padding_mode="circular") for _ in range(2))
    x = image()
    torch.testing.assert_close(a.then(b)(x), b(a(x)), **CLOSE)


def test_transposed_chains():
    up = kernel(6, 2, groups=2, stride=(2, 2), padding=((1, 0), (1, 0)), transposed=True)
    after, before = kernel(4, 3, (1, 1), groups=2), kernel(4, 4, (1, 1), bias=False)
    x = image(size=(4, 5))
    torch.testing.assert_close(up.then(after)(x), after(up(x)), **CLOSE)
    torch.testing.assert_close(before.then(up)(x), up(before(x)), **CLOSE)
    scale = Kernel.scaling(randn(6), randn(6), 2)
    torch.testing.assert_close(up.then(scale)(x), scale(up(x)), **CLOSE)


def test_elementary_kernels():
    x = image()
    torch.testing.assert_close(Kernel.identity(4, 2)(x), x)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(Kernel.permutation(order, 2)(x), x[:, order])
    pool = Kernel.average(4, (2, 3), stride=(2, 1), padding=((1, 1), (0, 0)))
    expected = torch.nn.functional.avg_pool2d(x, (2, 3), (2, 1), (1, 0))
    torch.testing.assert_close(pool(x), expected)
    k = kernel()
    mask = torch.rand(4, 4, 1, 1) > 0.5
    torch.testing.assert_close(k.masked(mask)(x), torch.nn.functional.conv2d(x, k.weight * mask, k.bias))


@pytest.mark.parametrize("groups", [1, 2])
def test_same_function_in_other_forms(groups):
    k = kernel(4, 1, groups=4, dilation=(2, 4), padding=((2, 2), (4, 4)))
    x = image()
    for other in (k.grouped(groups), k.dilated((1, 2)), k.embedded((1, 0), (2, 3))):
        torch.testing.assert_close(other(x), k(x), **CLOSE)
    assert k.grouped(groups).weight.shape[1] == 4 // groups


def test_operations_are_differentiable():
    a, b = randn(2, 2, 3, 3, requires_grad=True), randn(2, 2, 2, 2, requires_grad=True)
    x = image(2)

    assert torch.autograd.gradcheck(lambda a, b: Kernel(a).then(Kernel(b)).weight, (a, b))
    grads = torch.autograd.grad(Kernel(b)(Kernel(a)(x)).square().sum(), (a, b))
    for g, h in zip(torch.autograd.grad(Kernel(a).then(Kernel(b))(x).square().sum(), (a, b)), grads):
        torch.testing.assert_close(g, h, **CLOSE)


REFUSED_SUMS = {
    "out_channels is 4 and 2": (kernel(4), kernel(2)),
    "in_channels is 4 and 8": (kernel(4), kernel(4, 8)),
    "stride is (1, 1) and (2, 2)": (kernel(), kernel(stride=(2, 2))),
    "transposed is False and True": (kernel(), kernel(transposed=True)),
    "one output is (-2, -2) longer than its input, the other (0, 0)": (kernel(), kernel(padding=((1, 1), (1, 1)))),
    "padding modes ['circular', 'reflect']": tuple(
        kernel(padding=((1, 1), (1, 1)), padding_mode=m) for m in ("reflect", "circular")
    ),
}


@pytest.mark.parametrize("message", REFUSED_SUMS)
def test_sums_without_an_exact_kernel_are_refused(message):
    a, b = REFUSED_SUMS[message]
    with pytest.raises(UnsupportedError) as error:
        a.add(b)
    assert message in str(error.value)


SAME = ((1, 1), (1, 1))
REFUSED_CHAINS = {
    "the first gives 4 channels in 2-d, the second expects 6": (kernel(), kernel(4, 6)),
    "a layer with a bias (or norm) followed by zero padding": (kernel(4, 4, (1, 1)), kernel(padding=SAME)),
    "kernel size (3, 3), stride (1, 1), padding ((1, 1), (1, 1)) followed by one that pads": (
        kernel(bias=False, padding=SAME),
        kernel(padding=SAME),
    ),
    "(reflect) has no exact fold": (kernel(), kernel(padding=SAME, padding_mode="reflect")),
    "(circular) has no exact fold": (kernel(), kernel(padding=SAME, padding_mode="circular")),
    "padding modes ['reflect', 'zeros'] cannot be chained": (
        kernel(bias=False, padding=SAME, padding_mode="reflect"),
        kernel(padding=SAME),
    ),
    "a transposed convolution chains exactly only": (kernel(transposed=True), kernel()),
    "without bias or norm before it": (kernel(4, 4, (1, 1)), kernel(transposed=True)),
}


@pytest.mark.parametrize("message", REFUSED_CHAINS)
def test_chains_without_an_exact_kernel_are_refused(message):
    a, b = REFUSED_CHAINS[message]
    with pytest.raises(UnsupportedError) as error:
        a.then(b)
    assert message in str(error.value)


@pytest.mark.parametrize("pads", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_chain_is_exact_or_refused(mode, size, stride, pads):
    """Whatever `then` accepts is right at the borders too; what it refuses really differs there."""
    both = ((pads, pads),) * 2
    first = kernel(4, 4, (size, size), bias=False, stride=(stride, stride), padding=both, padding_mode=mode)
    second = kernel(4, 4, (3, 3), padding=SAME, padding_mode=mode)
    x = image(size=(11, 12))
    expected = second(first(x))
    try:
        received = first.then(second)(x)
    except UnsupportedError:
        naive = first.replace(bias=None).then(second.replace(padding=()))
        widened = tuple((p + stride, p + stride) for p, _ in first.padding)
        forced = naive.replace(padding=widened, padding_mode=mode)(x)
        assert forced.shape != expected.shape or not torch.allclose(forced, expected)
    else:
        torch.testing.assert_close(received, expected, **CLOSE)
