"""`kernel_of` for each ordinary module, and what it refuses."""

import pytest
import torch
from torch import nn

from foldconv import UnsupportedError
from foldconv.algebra import Kernel, Scale, Sum, kernel_of, kernel_rule, scale_and_shift
from foldconv.algebra.norms import after_norm, is_norm

from .trees import fill

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (11,)),
    "conv2d": (nn.Conv2d(4, 6, (2, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1)), (9, 10)),
    "conv3d": (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1), bias=False), (4, 5, 6)),
    "same": (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(3, 1)), (9, 10)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (9, 10)),
    **{
        mode: (nn.Conv2d(4, 6, (3, 5), padding=(2, 1), padding_mode=mode), (9, 10))
        for mode in ("reflect", "replicate", "circular")
    },
    "same circular": (nn.Conv2d(4, 4, 4, padding="same", padding_mode="circular"), (9, 10)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=3, output_padding=2, groups=2), (5,)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, (2, 3), stride=2, padding=(0, 1), output_padding=1), (5, 4)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, dilation=2, padding=1, bias=False), (3, 4, 3)),
}
OTHERS = {
    "norm": (nn.BatchNorm2d(4, eps=1e-2), (3, 3)),
    "norm without affine": (nn.BatchNorm1d(4, affine=False), (3,)),
    "sync norm": (nn.SyncBatchNorm(4), (3, 3)),
    "identity": (nn.Identity(), (3, 3)),
    "dropout": (nn.Dropout2d(0.5), (3, 3)),
    "scale": (Scale(4), (3, 3)),
    "pool": (nn.AvgPool2d((2, 3), stride=(1, 2), padding=(1, 0)), (6, 7)),
    "pool divided": (nn.AvgPool2d(2, divisor_override=3), (6, 7)),
    "pool1d": (nn.AvgPool1d(3, padding=1), (8,)),
    "pool3d": (nn.AvgPool3d(2, stride=1), (3, 4, 5)),
    "zero pad": (nn.ZeroPad2d((1, 2, 3, 0)), (3, 4)),
    "crop": (nn.ZeroPad2d((-1, 2, 0, -1)), (3, 4)),
    "reflection": (nn.ReflectionPad1d((2, 1)), (5,)),
    "replication": (nn.ReplicationPad3d(1), (2, 3, 2)),
    "circular pad": (nn.CircularPad2d((0, 2, 1, 0)), (3, 4)),
    "sequential": (nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))), (5, 5)),
    "empty sequential": (nn.Sequential(), (5, 5)),
    "sum": (Sum(nn.Identity(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), (5, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS | OTHERS)
def test_kernel_and_module_compute_what_the_module_computes(name):
    torch.manual_seed(0)
    module, spatial = (CONVOLUTIONS | OTHERS)[name]
    fill(module.double().eval())
    x = torch.randn(2, 4, *spatial, dtype=torch.float64)
    kernel = kernel_of(module, in_channels=4, ndim=len(spatial))
    for received in (kernel(x), kernel.to_module()(x)):
        torch.testing.assert_close(received, module(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_comes_back_with_its_own_arguments(name):
    module, _ = CONVOLUTIONS[name]
    back = kernel_of(module).to_module()
    assert type(back) is type(module)
    for argument in ("kernel_size", "stride", "dilation", "groups", "in_channels", "out_channels"):
        assert getattr(back, argument) == getattr(module, argument)
    if not isinstance(module.padding, str):
        assert (back.padding, back.padding_mode) == (module.padding, module.padding_mode)


def test_the_evaluation_function_is_taken_whatever_the_mode():
    module = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.9)).double()
    fill(module)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(kernel_of(module.train())(x), module.eval()(x))


def test_dtype_none_keeps_the_parameters_type_and_graph():
    conv = nn.Conv2d(2, 2, 3)
    kernel = kernel_of(conv, dtype=None)
    assert kernel.weight is conv.weight
    assert kernel_of(conv).weight.dtype == torch.float64


class Square(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) ** 2


class Subclass(nn.Conv2d):
    """Keeps torch's forward, so torch's rule holds."""


def test_subclasses_count_only_with_their_forward_unchanged():
    assert kernel_of(Subclass(1, 1, 3)).size == (3, 3)
    with pytest.raises(UnsupportedError, match=r"no rule gives a kernel for .*Square; if it is linear, register one"):
        kernel_of(Square(1, 1, 3))


REFUSED = {
    r"^1: no rule gives a kernel for torch.nn.modules.activation.ReLU": nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()),
    r"^0.1: no rule gives .*ReLU": nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())),
    r"^1.0: no rule gives .*Sigmoid": Sum(nn.Conv2d(1, 1, 1), nn.Sequential(nn.Sigmoid())),
    r"BatchNorm2d keeps no running statistics": nn.BatchNorm2d(3, track_running_stats=False),
    r"GroupNorm normalizes by statistics of its own input": nn.Sequential(nn.Conv2d(1, 2, 1), nn.GroupNorm(1, 2)),
    r"InstanceNorm2d normalizes by statistics": nn.InstanceNorm2d(2, track_running_stats=False),
    r"ceil_mode=True averages partial windows": nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(2, ceil_mode=True)),
    r"count_include_pad=False divides by another": nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.AvgPool2d(3, padding=1, count_include_pad=False)
    ),
    r"Identity alone does not tell its channels and dimensions; pass in_channels= and ndim=": nn.Identity(),
    r"a Sum without branches": nn.Sequential(nn.Conv2d(1, 1, 1), Sum()),
    r"^1: Conv2d expects 4 channels in 2-d, received 2 in 2-d": nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(4, 1, 1)),
    r"^1: Conv1d expects 1 channels in 1-d, received 1 in 2-d": Sum(nn.Conv2d(1, 1, 1), nn.Conv1d(1, 1, 1)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_exact_kernel_is_refused_with_its_name(message):
    with pytest.raises(UnsupportedError, match=message):
        kernel_of(REFUSED[message])


def test_a_module_of_ones_own_gets_a_rule():
    class Shift(nn.Module):
        def forward(self, x):
            return x + 1

    @kernel_rule(Shift)
    def _(module, channels, ndim):
        one = torch.ones(channels, dtype=torch.float64)
        return Kernel.scaling(one, one, ndim)

    net = nn.Sequential(nn.Conv2d(1, 2, 1), Shift()).double()
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(kernel_of(net)(x), net(x))


def test_norms_of_other_libraries():
    timm_layers = pytest.importorskip("timm.layers")
    frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(3, eps=1e-3)
    frozen.running_mean.normal_()
    frozen.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(kernel_of(frozen, ndim=2, in_channels=3, dtype=torch.float32)(x), frozen(x))
    active = timm_layers.BatchNormAct2d(3)
    assert is_norm(active)
    assert isinstance(after_norm(active), nn.ReLU)
    # The norm alone can be described; the layer with its activation cannot.
    assert len(scale_and_shift(active)) == 2
    with pytest.raises(UnsupportedError, match=r"no rule gives a kernel for .*BatchNormAct2d"):
        kernel_of(active)


def test_kernels_without_parameters_are_made_where_the_parameters_are():
    block = nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 1, bias=False, device="meta"), nn.AvgPool2d(3, 1, 1))
    assert kernel_of(Sum(block, nn.Conv2d(2, 3, 1, device="meta"))).weight.device.type == "meta"
