"""The master property: running the modules = composing the kernel = the folded convolution, borders included."""

import torch
from hypothesis import HealthCheck, given, settings

from foldconv.algebra import kernel_of

from .trees import trees

TOLERANCE = 1e-10


def assert_same(tree, x):
    kernel = kernel_of(tree, in_channels=x.shape[1], ndim=x.dim() - 2)
    expected = tree(x)
    for received in (kernel(x), kernel.to_module()(x)):
        assert received.shape == expected.shape
        assert (received - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(trees())
@torch.no_grad()
def test_features_kernel_and_convolution_agree(drawn):
    assert_same(*drawn)
