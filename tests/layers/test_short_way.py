"""Where nothing is special a composed layer takes a short way to its kernel: it calls little and changes nothing."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import foldconv
from foldconv import DOConv2d, OREPAConv2d, UnsupportedError

pytest.importorskip("numba")
F64 = {"dtype": torch.float64}
EXTRA = {DOConv2d: "D", OREPAConv2d: "avg_conv"}
"""A parameter of each beside ``weight``."""
classes = pytest.mark.parametrize("cls", EXTRA)


def randomized(layer):
    """Every parameter far from its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    return layer


def long_way(layer, **changed):
    """The kernel of the class that is tested, by torch's operations, whatever a subclass says."""
    cls = next(cls for cls in EXTRA if isinstance(layer, cls))
    with foldconv.ops.using("torch"):
        return cls.compose(layer, *(changed.get(name, getattr(layer, name, None)) for name in layer.composed_from))


def calls(run, *arguments):
    """How many functions that calls, Python's and torch's, when not run for the first time."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    run(*arguments)
    sys.setprofile(note)
    try:
        run(*arguments)
    finally:
        sys.setprofile(None)
    return count


def step(layer, x):
    layer(x).sum().backward()


@pytest.mark.parametrize(("method", "forward", "both"), [("doconv", 28, 48), ("orepa", 86, 206)])
def test_a_small_layer_calls_little(method, forward, both):
    """What a small network's step costs beside the plain one is calls, not arithmetic."""
    for channels in (1, 16, 64):
        plain, x = nn.Conv2d(channels, 16, 3), torch.randn(1, channels, 4, 4)
        layer = foldconv.expand(plain, method)
        assert calls(layer, x) <= calls(plain, x) + forward
        assert calls(step, layer, x) <= calls(step, plain, x) + both


@classes
@pytest.mark.parametrize("amp", [False, True])
def test_it_composes_what_the_long_one_does(cls, amp):
    """Autocast casts no kernel; groups and layouts count; what is frozen gets no gradient."""

    class Seen(cls):
        def _conv_forward(self, input, weight, bias):
            return weight

    x = torch.zeros(1)
    for groups, options in ((1, {}), (2, {}), (1, {"memory_format": torch.channels_last})):
        layer = randomized(Seen(8, 16, 3, groups=groups, bias=False)).to(**options)
        getattr(layer, EXTRA[cls]).requires_grad_(groups == 1)
        learned = [p for p in layer.parameters() if p.requires_grad]
        found = []
        for path in ("torch", None, None):  # the last by the short way
            forced = contextlib.nullcontext() if path is None else foldconv.ops.using(path)
            with forced, torch.autocast("cpu", torch.bfloat16, enabled=amp):
                kernel = layer(x)
            found.append((kernel, *torch.autograd.grad(kernel.square().sum(), learned)))
        for wanted, first, second in zip(*found, strict=True):
            torch.testing.assert_close(first, wanted, rtol=1e-5, atol=1e-4)
            assert torch.equal(first, second)


@classes
def test_it_is_not_taken_past_what_a_subclass_or_a_tool_says(cls):
    class Doubled(cls):
        def kernel(self):
            return 2 * super().kernel()

    class Tripled(cls):
        def compose(self, *parameters):
            return 3 * super().compose(*parameters)

    def expect(layer, kernel):
        for _ in range(2):
            torch.testing.assert_close(layer(x), F.conv2d(x, kernel), rtol=1e-10, atol=1e-10)

    x = torch.randn(1, 4, 6, 6, **F64)
    for kind, factor in ((cls, 1), (Doubled, 2), (Tripled, 3)):
        layer = randomized(kind(4, 6, 3, bias=False, **F64))
        expect(layer, factor * long_way(layer))
    layer = randomized(cls(4, 6, 3, bias=False, **F64))
    layer(x)
    name = EXTRA[cls]
    prune.l1_unstructured(layer, name, 0.5)
    expect(layer, long_way(layer, **{name: getattr(layer, f"{name}_orig") * getattr(layer, f"{name}_mask")}))


@classes
def test_it_is_not_taken_for_parameters_that_were_cut(cls):
    layer, x = cls(4, 6, 3), torch.randn(1, 4, 6, 6)
    layer(x)
    extra = getattr(layer, EXTRA[cls])
    extra.data = extra.data[:3].clone()
    with pytest.raises(UnsupportedError, match="expected"):
        layer(x)
