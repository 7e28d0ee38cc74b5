"""Numba's weight gradient of large depthwise kernels is torch's."""

import pytest
import torch
import torch.nn.functional as F

from foldconv.ops import _cpu, _depthwise
from foldconv.ops._maps import Window, convolve_backward

pytest.importorskip("numba")

# channels, size, kernel, stride, padding, dilation
CASES = [
    (3, (9, 7), (5, 5), (1, 1), (2, 2), (1, 1)),
    (130, (9, 6), (5, 4), (2, 1), (2, 0), (1, 1)),
    (4, (5, 4), (7, 7), (1, 1), (3, 3), (1, 1)),
    (2, (11, 12), (4, 3), (3, 2), (4, 5), (2, 3)),
]


def test_is_torchs():
    for number, (channels, size, kernel, stride, padding, dilation) in enumerate(CASES):
        x = torch.randn(3, channels, *size, dtype=torch.float64)
        x = x.contiguous(memory_format=torch.channels_last) if number % 2 else x
        weight = torch.randn(channels, 1, *kernel, dtype=torch.float64)
        tensors = [t.requires_grad_() for t in (x, weight)]
        y = F.conv2d(x, weight, None, stride, padding, dilation, channels)
        g = torch.randn_like(y)
        expected = torch.autograd.grad(y, tensors, g)
        window = Window(stride, padding, dilation, channels, (0, 0))
        received = convolve_backward(g, x.detach(), weight.detach(), None, window, [True, True, False])[:2]
        last = [t.detach().contiguous(memory_format=torch.channels_last) for t in (g, x)]
        assert _depthwise.weight_gradient(*last, weight, window) is not None
        for a, b in zip(received, expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_torch_where_it_cannot_run(monkeypatch):
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 5, 5)
    window = Window((1, 1), (2, 2), (1, 1), 4, (0, 0))
    first = convolve_backward(x, x, weight, None, window, [False, True, False])[1]
    assert _depthwise.weight_gradient(x, x, weight[:, :, :3, :3], window) is None
    assert _depthwise.weight_gradient(x, x, torch.randn(8, 1, 5, 5), window) is None
    monkeypatch.setattr(_cpu, "_has_numba", lambda: False)
    assert _depthwise.weight_gradient(x, x, weight, window) is None
    second = convolve_backward(x, x, weight, None, window, [False, True, False])[1]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
