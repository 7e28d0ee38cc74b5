"""OREPA against its definition written out in loops. What the original computes: tests/checkpoints."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foldconv
from foldconv import (
    OREPA,
    OREPAConv1d,
    OREPAConv2d,
    OREPAConv3d,
    OREPALargeConv1d,
    OREPALargeConv2d,
    OREPALargeConv3d,
    UnsupportedError,
)
from foldconv.testing import CHECKS, Case, checks

F64 = {"dtype": torch.float64}


def same(received, wanted, tolerance=1e-10):
    torch.testing.assert_close(received, wanted, rtol=tolerance, atol=tolerance)


def randomized(layer, seed=0):
    """Every parameter far from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    return layer


def plain(layer, kernel):
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    cls = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layer.kernel_size)]
    made = cls(**{name: getattr(layer, name) for name in names}, bias=layer.bias is not None, dtype=kernel.dtype)
    made.load_state_dict({"weight": kernel} | ({} if layer.bias is None else {"bias": layer.bias}))
    return made


# ---------------------------------------------------------------------- the definition


def cosine(i, outs, size, tap):
    """Filter i of `outs` at a tap: filters are divided evenly among the dimensions."""
    part = outs / len(size)
    axis = next(d for d in range(len(size)) if i < (d + 1) * part)
    angle = math.pi * (tap[axis] + 0.5) * (i + 1 - axis * part) / size[axis]
    return torch.tensor(math.cos(angle), dtype=torch.float32).double()


def by_definition(layer, point=True):
    size, groups = tuple(layer.kernel_size), layer.groups
    outs, ins = layer.out_channels // groups, layer.in_channels // groups
    taps = math.prod(size)
    p = {name: value.detach() for name, value in layer.named_parameters()}
    inner = p["kxk_idconv1"].shape[0] // groups
    zero = (0,) * len(size)
    centre = tuple((k - 1) // 2 for k in size)
    v = p["vector"] if point else torch.cat([p["vector"][:4], torch.zeros_like(p["vector"][:1]), p["vector"][4:]])
    kernel = torch.zeros_like(p["weight"])
    for g, o, i in itertools.product(range(groups), range(outs), range(ins)):
        out, source = g * outs + o, g * ins + i
        for tap in itertools.product(*map(range, size)):
            value = v[0, out] * p["weight"][(out, i, *tap)]
            value += v[1, out] * p["avg_conv"][(out, i, *zero)] / taps
            value += v[2, out] * p["prior_conv"][(out, i, *zero)] * cosine(out, layer.out_channels, size, tap)
            for t in range(inner):
                one = p["kxk_idconv1"][(g * inner + t, i, *zero)] + float(t % ins == i)
                value += v[3, out] * one * p["kxk_conv2"][(out, t, *tap)]
            if point and tap == centre:
                value += v[4, out] * p["conv_1x1"][(out, i, *zero)]
            for t in range(8):
                value += v[5, out] * p["gconv_pw"][(out, 8 * i + t, *zero)] * p["gconv_dw"][(8 * source + t, 0, *tap)]
            kernel[(out, i, *tap)] = value
    return kernel


CASES = {
    "1d": (OREPAConv1d, (4, 6, 5), {"padding": 2, "stride": 2}),
    "1d_even_groups": (OREPAConv1d, (4, 6, 4), {"groups": 2, "dilation": 2, "bias": False}),
    "2d": (OREPAConv2d, (3, 5, 3), {"padding": 1}),
    "2d_5": (OREPAConv2d, (2, 4, 5), {"padding": 2, "stride": 2}),
    "2d_7": (OREPAConv2d, (1, 3, 7), {"padding": 3, "stride": 2}),
    "2d_groups": (OREPAConv2d, (6, 9, 3), {"groups": 3, "padding": 2, "dilation": 2}),
    "2d_depthwise_of_four": (OREPAConv2d, (4, 4, 3), {"groups": 4, "padding": 1}),
    "2d_depthwise_of_six": (OREPAConv2d, (6, 12, 3), {"groups": 6, "bias": False}),
    "2d_rectangular": (OREPAConv2d, (3, 4, (1, 5)), {"padding": (0, 2), "padding_mode": "reflect"}),
    "2d_even_same": (OREPAConv2d, (3, 4, (2, 4)), {"padding": "same", "padding_mode": "circular"}),
    "3d": (OREPAConv3d, (2, 4, (3, 2, 1)), {"padding": (1, 1, 0), "stride": (1, 2, 1)}),
}


@pytest.mark.parametrize("point", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_kernel_and_features_follow_the_definition(case, point):
    cls, arguments, options = CASES[case]
    layer = randomized(cls(*arguments, **options, point=point, **F64))
    kernel = by_definition(layer, point)
    same(layer.kernel(), kernel)
    x = torch.randn(2, layer.in_channels, *range(9, 9 + len(layer.kernel_size)), **F64)
    wanted = plain(layer, kernel)(x)
    for received in (layer(x), layer.feature_forward(x), layer.eval()(x), layer.fold()(x)):
        same(received, wanted)


@pytest.mark.parametrize(("ins", "outs"), [(3, 5), (5, 3), (4, 4)])
def test_one_by_one_is_a_kernel_and_a_product(ins, outs):
    layer = randomized(OREPAConv2d(ins, outs, 1, stride=2, **F64))
    w1, w2 = layer.l2i_conv1.detach()[:, :, 0, 0], layer.l2i_conv2.detach()[:, :, 0, 0]
    kernel = torch.zeros(outs, ins, 1, 1, **F64)
    for o, i in itertools.product(range(outs), range(ins)):
        product = sum(w2[o, t] * w1[t, i] for t in range(min(ins, outs)))
        kernel[o, i] = layer.vector[0, o].detach() * layer.weight.detach()[o, i] + layer.vector[1, o].detach() * product
    same(layer.kernel(), kernel)
    x = torch.randn(2, ins, 5, 6, **F64)
    for received in (layer(x), layer.feature_forward(x), layer.fold()(x)):
        same(received, plain(layer, kernel)(x))


@pytest.mark.parametrize("large", ["orepa", "plain"])
@pytest.mark.parametrize(
    ("cls", "arguments", "options"),
    [
        (OREPALargeConv2d, (3, 6, 7), {"padding": 3, "stride": 2}),
        (OREPALargeConv2d, (4, 6, 9), {"padding": 4, "groups": 2, "padding_mode": "reflect"}),
        (OREPALargeConv2d, (2, 3, (3, 7)), {"padding": (2, 6), "dilation": 2, "bias": False}),
        (OREPALargeConv1d, (2, 4, 7), {"padding": "same", "padding_mode": "circular"}),
        (OREPALargeConv3d, (1, 2, (1, 7, 3)), {"padding": (0, 3, 1)}),
    ],
    ids=str,
)
def test_a_large_kernel_is_the_stack_of_its_convolutions(cls, arguments, options, large):
    layer = randomized(cls(*arguments, **options, large=large, **F64))
    ndim = len(layer.kernel_size)
    modules = []
    for stage, kernel in zip(layer.stages, layer.factor_kernels(*(getattr(layer, n) for n in layer.composed_from))):
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
        size = kernel.shape[2:]
        made = conv(
            stage.in_channels, 1 * layer.out_channels, size, dilation=layer.dilation, groups=layer.groups, **F64
        )
        made.load_state_dict({"weight": kernel.detach(), "bias": torch.zeros(layer.out_channels, **F64)})
        modules.append(made)
    modules[-1].stride = layer.stride
    if layer.bias is not None:
        modules[-1].bias = layer.bias
    x = torch.randn(2, layer.in_channels, *(17, 18, 9)[:ndim], **F64)
    padded = x
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    wanted = nn.Sequential(*modules)(padded)
    for received in (layer(x), layer.feature_forward(x), layer.eval()(x), layer.fold()(x)):
        same(received, wanted)


def test_kernels_of_a_stack_are_orepa_kernels():
    layer = randomized(OREPALargeConv2d(3, 6, 7, **F64))
    kernels = layer.factor_kernels(*(getattr(layer, n) for n in layer.composed_from))
    for n, kernel in enumerate(kernels):
        alone = OREPAConv2d(6 if n else 3, 6, 3, bias=False, **F64)
        alone.load_state_dict({name: getattr(layer, f"{name}{n}") for name in alone.composed_from})
        same(kernel, by_definition(alone))


def test_prior_for_three_taps_is_the_originals():
    layer = OREPAConv2d(1, 8, 3, **F64)
    prior = layer.branches.prior(layer.weight).reshape(8, 3, 3)
    for i, h, w in itertools.product(range(8), range(3), range(3)):
        angle = math.pi * ((h if i < 4 else w) + 0.5) * (i + 1 if i < 4 else i - 3) / 3
        assert prior[i, h, w].item() == pytest.approx(math.cos(angle), abs=1e-7)
    single = OREPAConv2d(1, 8, 3).branches.prior(torch.zeros(1))
    assert torch.equal(single.double(), prior.reshape(8, 9)), "the constant is the same in every dtype"


# ---------------------------------------------------------------------- the battery on the options


def large_cases(method):
    options = {"kernel_size": 7, "padding": 3, "in_channels": 2, "out_channels": 20}
    variants = [{}, {"bias": False, "stride": 2}, {"in_channels": 1, "out_channels": 9}, {"groups": 2}]
    variants += [{"padding": (3, 6), "dilation": (1, 2), "padding_mode": "circular"}]
    found = [Case(nn.Conv2d, tuple((options | v).items()), (10, 11)) for v in variants]
    return [*found, Case(nn.Conv1d, tuple((options | {"padding": "same"}).items()), (12,))]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("large", ["orepa", "plain"])
def test_conformance_of_large_kernels(monkeypatch, large, check):
    monkeypatch.setattr(checks, "cases", large_cases)
    CHECKS[check](OREPA(large=large))


@pytest.mark.parametrize("check", ["preserves_the_function", "folds_exactly", "survives_copies_and_checkpoints"])
def test_conformance_without_the_point(check):
    CHECKS[check](OREPA(point=False))


# ---------------------------------------------------------------------- initialization


def check_uniform(values, std):
    assert values.mean().abs().item() < 0.06 * std
    assert values.std().item() == pytest.approx(std, rel=0.03)
    assert values.abs().max().item() == pytest.approx(std * math.sqrt(3), rel=0.02)


@pytest.mark.parametrize(("groups", "inner"), [(1, 64), (4, 64), (8, 128)])
@pytest.mark.parametrize("point", [True, False])
def test_paper_values(groups, inner, point):
    torch.manual_seed(0)
    layer = OREPAConv2d(64, 96, 3, groups=groups, point=point)
    per_group = 64 // groups
    gain = math.sqrt(2.0 if point else 1.0)  # kaiming_uniform: std = gain / sqrt(fan_in), a = 0 or 1
    fans = {
        "weight": per_group * 9,
        "avg_conv": per_group,
        "prior_conv": per_group,
        "kxk_conv2": inner // groups * 9,
        "gconv_dw": 9,
        "gconv_pw": per_group * 8,
    } | ({"conv_1x1": per_group} if point else {})
    for name, fan in fans.items():
        check_uniform(getattr(layer, name), gain / math.sqrt(fan))
    assert layer.kxk_idconv1.shape == (inner, per_group, 1, 1)
    assert layer.kxk_idconv1.abs().max() == 0
    rows = [0.25, 0.25, 0.0, 0.5, 1.0, 0.5] if point else [0.25, 0.25, 0.0, 0.5, 0.5]
    assert torch.equal(layer.vector, torch.tensor(rows)[:, None].expand(-1, 96))
    assert "conv_1x1" in layer.state_dict() or not point


def test_effective_spread_is_the_papers():
    """Variances add: in units of 2 / (9·I), per tap .25², .25²/9, .5², 1 (all at the centre) and 2·.5²."""
    torch.manual_seed(0)
    kernel = OREPAConv2d(128, 128, 3).kernel().detach()
    unit = 2 / (9 * 128)
    others = 0.25**2 + 0.25**2 / 9 + 0.5**2 + 2 * 0.5**2
    outer = torch.ones(3, 3, dtype=torch.bool)
    outer[1, 1] = False
    assert kernel[:, :, outer].std().item() == pytest.approx(math.sqrt(unit * others), rel=0.02)
    assert kernel[:, :, 1, 1].std().item() == pytest.approx(math.sqrt(unit * (others + 9)), rel=0.02)
    assert kernel.mean().abs().item() < 1e-3
    assert kernel.std().item() / nn.Conv2d(128, 128, 3).weight.std().item() == pytest.approx(3.3, abs=0.05)


@pytest.mark.parametrize(("ins", "outs"), [(48, 64), (64, 48), (48, 48)])
def test_paper_values_of_one_by_one(ins, outs):
    torch.manual_seed(0)
    layer = OREPAConv2d(ins, outs, 1)
    inner = min(ins, outs)
    identity, drawn = (layer.l2i_conv1, layer.l2i_conv2) if outs > ins else (layer.l2i_conv2, layer.l2i_conv1)
    assert torch.equal(identity.flatten(1), torch.eye(inner))
    check_uniform(drawn, 1 / math.sqrt(ins if outs <= ins else inner))
    check_uniform(layer.weight, 1 / math.sqrt(ins))
    assert torch.equal(layer.vector, torch.tensor([1.0, 0.5])[:, None].expand(-1, outs))


@pytest.mark.parametrize("large", ["orepa", "plain"])
def test_paper_values_of_large_kernels(large):
    torch.manual_seed(0)
    layer = OREPALargeConv2d(24, 48, 7, large=large)
    gain = math.sqrt(2.0) if large == "orepa" else 1 / math.sqrt(3)
    for n, ins in enumerate((24, 48, 48)):
        check_uniform(getattr(layer, f"weight{n}"), gain / math.sqrt(9 * ins))
        if large == "orepa":
            check_uniform(getattr(layer, f"avg_conv{n}"), gain / math.sqrt(ins))
            assert layer.state_dict()[f"vector{n}"][:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]
    assert layer.bias.abs().max().item() <= 1 / math.sqrt(24 * 49)
    assert layer.weight.shape == (48, 24, 7, 7)


@pytest.mark.parametrize("arguments", [(4, 6, 3), (4, 6, 1), (4, 6, (2, 5)), (8, 16, 3, 1, 0, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_preserve_keeps_the_weight_bit_for_bit(arguments, dtype):
    conv = nn.Conv2d(*arguments, dtype=dtype)
    layer = foldconv.expand(conv, "orepa", inplace=True)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert torch.equal(layer.kernel(), conv.weight)
    assert layer.vector[0].min() == layer.vector[0].max() == 1
    assert layer.vector[1:].abs().max() == 0


@pytest.mark.parametrize("large", ["orepa", "plain"])
@pytest.mark.parametrize(
    ("arguments", "options"),
    [((3, 32, 7), {}), ((4, 40, (3, 7)), {"groups": 2}), ((1, 9, 9), {"dilation": 2}), ((2, 13, (1, 11)), {})],
)
def test_large_kernels_start_from_a_trained_one(arguments, options, large):
    conv = nn.Conv2d(*arguments, **options, **F64)
    layer = foldconv.expand(conv, OREPA(large=large))
    assert isinstance(layer, OREPALargeConv2d)
    assert torch.equal(layer.kernel(), conv.weight)
    single = foldconv.expand(conv.float(), OREPA(large=large))
    same(single.kernel(), conv.weight, 1e-7)


@pytest.mark.parametrize("config", [OREPA(), OREPA(point=False), OREPA(large="orepa"), OREPA(large="plain")])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_every_parameter_learns_within_two_steps(config, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 28, size, bias=False, **F64), nn.BatchNorm2d(28, **F64))
    net = foldconv.expand(net, config)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    largest = dict.fromkeys(dict(net[0].named_parameters()), 0.0)
    x, target = torch.randn(4, 3, 9, 9, **F64), torch.randn(4, 28, 10 - size, 10 - size, **F64)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        for name, p in net[0].named_parameters():
            largest[name] = max(largest[name], p.grad.abs().max().item())
        optimizer.step()
    assert min(largest.values()) > 1e-9, largest


def test_paper_init_draws_large_kernels_that_could_not_start_from_one():
    conv = nn.Conv2d(4, 6, 7, **F64)
    drawn = foldconv.expand(conv, OREPA(large="orepa"), init="paper")
    assert isinstance(drawn, OREPALargeConv2d)
    assert torch.isfinite(drawn.kernel()).all()
    same(drawn.fold().weight, drawn.kernel())


# ---------------------------------------------------------------------- refusals


def test_refusals():
    wide = "fits a chain whose inner widths per group are at least (36, 36) or (16, 24), received (6, 6)"
    with pytest.raises(UnsupportedError, match=re.escape(wide)):
        foldconv.expand(nn.Conv2d(4, 6, 7), OREPA(large="plain"))
    with pytest.raises(UnsupportedError, match=r"^0: a trained kernel of size \(7, 7\) with 4 input channels"):
        foldconv.expand(nn.Sequential(nn.Conv2d(4, 6, 7)), OREPA(large="orepa"))
    with pytest.raises(ValueError, match="branches gather; a transposed convolution scatters"):
        foldconv.expand(nn.ConvTranspose2d(4, 4, 3), "orepa")
    with pytest.raises(ValueError, match="one tap and 2 groups; OREPA_1x1 is defined for one group"):
        foldconv.expand(nn.Conv2d(4, 4, 1, groups=2), "orepa")
    with pytest.raises(UnsupportedError, match="one tap and 4 groups"):
        OREPAConv2d(4, 4, 1, groups=4)
    with pytest.raises(ValueError, match=r"its size \(7, 8\) is even, .* use large=None"):
        foldconv.expand(nn.Conv2d(1, 30, (7, 8)), OREPA(large="orepa"))
    with pytest.raises(UnsupportedError, match=r"sizes of at least 7, received \(5, 5\)"):
        OREPALargeConv2d(1, 30, 5)
    with pytest.raises(UnsupportedError, match="large: expected 'orepa' or 'plain', received 'deep'"):
        OREPALargeConv2d(1, 30, 7, large="deep")
    with pytest.raises(UnsupportedError, match="large: expected None, 'orepa' or 'plain', received 'deep'"):
        OREPA(large="deep")


# ---------------------------------------------------------------------- use


def test_scales_do_not_decay():
    net = nn.Sequential(nn.Conv2d(3, 28, 7), nn.Conv2d(28, 8, 3), nn.Conv2d(8, 8, 1))
    net = foldconv.expand(net, OREPA(large="orepa"))
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in foldconv.parameter_groups(net, 0.1))
    vectors = {"0.vector0", "0.vector1", "0.vector2", "1.vector", "2.vector"}
    assert kept == vectors | {"0.bias", "1.bias", "2.bias"}
    assert {"0.weight0", "1.weight", "1.gconv_pw", "2.l2i_conv1"} <= decayed


def test_the_papers_resnets():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        small, deep = torchvision.models.resnet18(), torchvision.models.resnet50()
    small = foldconv.expand(small, OREPA(large="orepa"), exclude="*.downsample.*")
    deep = foldconv.expand(deep, OREPA(large="orepa"))
    kinds = [type(m).__name__ for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert kinds.count("OREPALargeConv2d") == 1
    assert kinds.count("OREPAConv2d") == 16
    assert kinds.count("Conv2d") == 3
    assert type(deep.conv1) is OREPALargeConv2d
    assert type(deep.layer1[0].downsample[0]) is OREPAConv2d
    assert "l2i_conv1" in deep.layer1[0].conv3.state_dict()
    assert all(type(m) is not nn.Conv2d for m in deep.modules())


def test_a_file_keeps_the_options(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 28, 7), nn.Conv2d(28, 8, 3), nn.Conv2d(8, 8, 1)).double()
    rich = foldconv.expand(net, OREPA(large="plain", point=False))
    for layer in rich:
        randomized(layer)
    foldconv.save(rich, tmp_path / "net.safetensors")
    again = foldconv.load(tmp_path / "net.safetensors", net)
    x = torch.randn(1, 3, 12, 12, **F64)
    same(again(x), rich(x))
    assert [layer.method for layer in again] == [OREPA(large="plain"), OREPA(point=False), OREPA(point=False)]


def test_repr_tells_the_options():
    assert repr(OREPAConv2d(1, 2, 3)) == "OREPAConv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))"
    assert repr(OREPAConv2d(1, 2, 3, point=False)).endswith("stride=(1, 1), point=False)")
    assert repr(OREPALargeConv2d(1, 9, 7)).endswith("stride=(1, 1), large='orepa')")


def test_composition_cost():
    # Products of the 1×1 into the k×k (8 inner channels) and of 8 depthwise filters, and six scales.
    assert OREPAConv2d(8, 6, 3).composition_cost() == 6 * 8 * 9 * (8 + 8 + 6)
    assert OREPAConv2d(8, 6, 1).composition_cost() == 6 * 8 * (6 + 2)
    chained = 6 * 6 * 9 * 9 * 3 + 6 * 6 * 9 * 25 * 3
    assert OREPALargeConv2d(3, 6, 7, large="plain").composition_cost() == chained
