"""Products over blocks compute what the definition does: shapes, groups, layouts, dtypes, gradients of gradients."""

import itertools

import torch

from foldconv import ops

F64 = {"dtype": torch.float64}
# inputs, outputs, groups, positions, taps of W
SHAPES = [
    (16, 32, 1, (3, 3), 9),
    (70, 66, 1, (3, 3), 9),  # blocks of two channels
    (64, 128, 2, (3, 3), 12),
    (64, 96, 1, (2, 2), 4),  # of four
    (6, 6, 6, (3, 3), 9),
    (5, 7, 1, (2,), 2),
    (1, 9, 1, (3,), 4),
    (6, 10, 2, (5, 5), 25),
]


def test_kernel_and_gradients():
    torch.manual_seed(0)
    for (inputs, outputs, groups, size, S), last, (dtype, tolerance) in itertools.product(
        SHAPES, [False, True], [(torch.float64, 1e-13), (torch.float32, 2e-6)]
    ):
        k = torch.Size(size).numel()
        taps = torch.randn(outputs, inputs // groups, S, dtype=dtype)
        taps = taps.transpose(1, 2).contiguous().transpose(1, 2) if last else taps
        taps = taps.unflatten(2, size) if k == S else taps
        parameters = taps.requires_grad_(), torch.randn(inputs, k, S, dtype=dtype, requires_grad=True)
        found = []
        for path in ("blocks", "torch"):
            with ops.using(path):
                kernel = ops.compose_depthwise(*parameters, groups)
            grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
            found.append((kernel, *torch.autograd.grad(kernel, parameters, grad)))
        for received, wanted in zip(*found, strict=True):
            scale = wanted.detach().abs().max().item()
            torch.testing.assert_close(received / scale, wanted / scale, rtol=0, atol=tolerance)
        assert kernel.shape == (taps.shape if k == S else (outputs, inputs // groups, k))
        if k == S:
            assert found[0][0].stride() == taps.stride()


def test_gradients_of_gradients():
    taps, D = torch.randn(4, 3, 2, 2, **F64, requires_grad=True), torch.randn(3, 4, 4, **F64, requires_grad=True)
    with ops.using("blocks"):
        assert torch.autograd.gradcheck(ops.compose_depthwise, (taps, D))
        assert torch.autograd.gradgradcheck(ops.compose_depthwise, (taps, D))
