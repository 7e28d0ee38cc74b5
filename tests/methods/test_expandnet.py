"""ExpandNets against the chains of convolutions that define them."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import foldconv
from foldconv import ExpandNet, ExpandNetConv1d, ExpandNetConv2d, ExpandNetConv3d, UnsupportedError
from foldconv.testing import CHECKS

F64 = {"dtype": torch.float64}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def same(received, wanted, tolerance=1e-10):
    torch.testing.assert_close(received, wanted, rtol=tolerance, atol=tolerance)


def randomized(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    return layer


def as_chain(layer):
    """The convolutions that the layer stands for: padding in the first, stride in the last, one bias."""
    factors = [getattr(layer, name) for name in layer.composed_from]
    convs = []
    for n, factor in enumerate(factors):
        last = n == len(factors) - 1
        conv = CONV[factor.dim() - 2](
            factor.shape[1] * layer.groups,
            factor.shape[0],
            factor.shape[2:],
            stride=layer.stride if last else 1,
            padding=0 if n else layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=last and layer.bias is not None,
            padding_mode=layer.padding_mode,
            **F64,
        )
        conv.weight = factor
        if conv.bias is not None:
            conv.bias = layer.bias
        convs.append(conv)
    return nn.Sequential(*convs)


CASES = {
    "cl": (ExpandNetConv2d, (4, 6, 3), {"padding": 1, "stride": 2}, "CL"),
    "cl_even": (ExpandNetConv2d, (3, 5, (2, 4)), {"padding": (1, 3), "dilation": 2}, "CL"),
    "cl_groups": (ExpandNetConv2d, (4, 6, 3), {"padding": 2, "groups": 2, "padding_mode": "reflect"}, "CL"),
    "cl_depthwise": (ExpandNetConv2d, (4, 4, 3), {"groups": 4, "padding": 1, "bias": False}, "CL"),
    "cl_1d": (ExpandNetConv1d, (4, 6, 4), {"padding": 2}, "CL"),
    "cl_3d": (ExpandNetConv3d, (2, 3, (3, 1, 2)), {"padding": (1, 0, 1)}, "CL"),
    "ck_5": (ExpandNetConv2d, (3, 4, 5), {"padding": 2, "stride": (1, 2), "padding_mode": "circular"}, "CK"),
    "ck_7_groups": (ExpandNetConv2d, (4, 6, 7), {"padding": 3, "groups": 2, "dilation": (1, 2)}, "CK"),
    "ck_rectangular": (ExpandNetConv2d, (2, 3, (3, 9)), {"padding": (1, 4), "padding_mode": "replicate"}, "CK"),
    "ck_1d": (ExpandNetConv1d, (2, 3, 11), {"padding": 5, "stride": 2, "bias": False}, "CK"),
    "ck_3d": (ExpandNetConv3d, (1, 2, (5, 1, 3)), {"padding": (2, 0, 1)}, "CK"),
}


@pytest.mark.parametrize("rate", [1, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_layer_is_its_chain(case, rate):
    cls, arguments, options, chain = CASES[case]
    layer = randomized(cls(*arguments, **options, rate=rate, chain=chain, **F64))
    x = torch.randn(2, layer.in_channels, *(17, 18, 9)[: len(layer.kernel_size)], **F64)
    wanted = as_chain(layer)(x)
    probe = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * probe).sum(), list(layer.parameters()))
    for run in (layer, layer.feature_forward):
        received = run(x)
        same(received, wanted)
        for got, want in zip(torch.autograd.grad((received * probe).sum(), list(layer.parameters())), expected):
            same(got, want, 1e-9)
    same(layer.eval()(x), wanted)
    same(layer.fold()(x), wanted)


@pytest.mark.parametrize(
    ("size", "chain", "widths"),
    [(3, "CL", [12, 18]), (5, "CK", [12]), (7, "CK", [12, 18]), (9, "CK", [12, 12, 18]), (11, "CK", [12, 12, 12, 18])],
)
def test_widths(size, chain, widths):
    layer = ExpandNetConv2d(4, 6, size, rate=3, chain=chain)
    shapes = [tuple(getattr(layer, name).shape) for name in layer.composed_from]
    assert [s[0] for s in shapes] == [*widths, 6]
    assert [s[1] for s in shapes] == [4, *widths]
    assert [s[2] for s in shapes] == ([1, size, 1] if chain == "CL" else [3] * (size // 2))


def test_composed_kernel_entry_by_entry():
    layer = randomized(ExpandNetConv1d(2, 3, 5, rate=1, chain="CK", **F64))
    first, second = layer.factor0.detach(), layer.factor1.detach()
    kernel = torch.zeros(3, 2, 5, **F64)
    for o, i, m, j, n in [
        (o, i, m, j, n) for o in range(3) for i in range(2) for m in range(2) for j in range(3) for n in range(3)
    ]:
        kernel[o, i, j + n] += second[o, m, n] * first[m, i, j]
    same(layer.kernel(), kernel)


@pytest.mark.parametrize("check", CHECKS)
def test_conformance_of_ck(check):
    CHECKS[check](ExpandNet(chain="CK"))


@pytest.mark.parametrize("check", ["preserves_the_function", "folds_exactly", "every_parameter_learns", "refuses_nan"])
def test_conformance_of_rate_one(check):
    CHECKS[check](ExpandNet(rate=1))


# ---------------------------------------------------------------------- initialization


PRESERVED = [
    ((8, 12, 3), {}, ExpandNet()),
    ((8, 12, 3), {}, ExpandNet(rate=1)),
    ((8, 12, (2, 5)), {"groups": 4}, ExpandNet(rate=2)),
    ((16, 16, 3), {"groups": 16}, ExpandNet()),
    ((8, 4, 5), {}, ExpandNet(chain="CK")),
    ((8, 4, 5), {"groups": 2}, ExpandNet(rate=5, chain="CK")),
    ((3, 5, 7), {}, ExpandNet(chain="CK")),
    ((3, 5, 9), {}, ExpandNet(chain="CK")),
    ((2, 2, 11), {}, ExpandNet(rate=9, chain="CK")),
    ((2, 3, (3, 7)), {}, ExpandNet(rate=3, chain="CK")),
]


@pytest.mark.parametrize(("arguments", "options", "config"), PRESERVED)
def test_starts_from_a_trained_kernel(arguments, options, config):
    torch.manual_seed(0)
    conv = nn.Conv2d(*arguments, **options, **F64)
    layer = foldconv.expand(conv, config)
    same(layer.kernel(), conv.weight, 1e-14)
    assert layer.bias is not conv.bias
    assert torch.equal(layer.bias, conv.bias)
    single = foldconv.expand(conv.float(), config)
    same(single.kernel(), conv.weight, 1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_cl_is_solved_for_any_pointwise_factors(groups):
    layer = randomized(ExpandNetConv2d(4, 6, 3, groups=groups, **F64))
    kernel = torch.randn_like(layer.weight)
    with torch.no_grad():
        layer.set_factors(layer.factorize(kernel))
    same(layer.kernel(), kernel)


@pytest.mark.parametrize("dims", [1, 2])
def test_cl_starts_in_several_blocks(dims):
    for ends, groups in (((64, 72), 1), ((144, 80), 2), ((37, 64), 1), ((40, 37), 1)):
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1](*[end * groups for end in ends], 3, groups=groups, **F64)
        layer = foldconv.expand(conv, ExpandNet(rate=3))
        same(layer.kernel(), conv.weight, 1e-14)
        for rows in layer.factor0.detach().flatten(1).unflatten(0, (groups, -1)):
            same(rows.mT @ rows, torch.eye(ends[0], **F64), 1e-14)
            mixed = (rows != 0).sum(1)
            assert mixed.min() >= 8
            assert len(set(mixed.tolist())) == 1
            assert torch.linalg.matrix_rank(rows) == ends[0]
            assert len(rows.unique(dim=0)) == len(rows)


def test_cl_keeps_the_norm_of_the_kernel():
    conv = nn.Conv2d(16, 24, 3)
    layer = foldconv.expand(conv, "expandnet")
    assert layer.factor1.norm().item() == pytest.approx(conv.weight.norm().item(), rel=1e-4)
    same(layer.factor0.flatten(1).mT @ layer.factor0.flatten(1), torch.eye(16), 1e-5)
    same(layer.factor2.flatten(1) @ layer.factor2.flatten(1).mT, torch.eye(24), 1e-5)


@pytest.mark.parametrize("config", [ExpandNet(), ExpandNet(chain="CK"), ExpandNet(rate=6, chain="CK")])
def test_every_entry_group_learns_within_two_steps(config):
    torch.manual_seed(0)
    layer = foldconv.expand(nn.Conv2d(3, 5, 7, **F64), config)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 3, 11, 11, **F64)
    rows = {}
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        for name, p in layer.named_parameters():
            rows[name] = rows.get(name, 0) + p.grad.abs().flatten(1).sum(1) if name != "bias" else p.grad.abs()
        optimizer.step()
    assert min(value.min().item() for value in rows.values()) > 1e-9, "a channel inside is idle"


@pytest.mark.parametrize(("size", "chain"), [(3, "CL"), (7, "CK")])
def test_paper_values_are_those_of_torchs_convolutions(size, chain):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, size)
    layer = foldconv.expand(conv, ExpandNet(chain=chain), init="paper")
    for name in layer.composed_from:
        values = getattr(layer, name).detach()
        std = 1 / math.sqrt(3 * math.prod(values.shape[1:]))
        assert values.mean().abs().item() < 0.06 * std
        assert values.std().item() == pytest.approx(std, rel=0.03)
        assert values.abs().max().item() == pytest.approx(std * math.sqrt(3), rel=0.02)
    bound = 1 / math.sqrt(16 * size**2)
    assert bound * 0.7 < layer.bias.abs().max().item() <= bound
    assert not torch.equal(layer.bias, conv.bias)


# ---------------------------------------------------------------------- weight


@pytest.mark.parametrize("mode", [True, False])
def test_weight_is_the_composed_kernel(mode):
    layer = randomized(ExpandNetConv2d(4, 6, 3, **F64)).train(mode)
    assert layer.weight.shape == (6, 4, 3, 3)
    same(
        layer.weight,
        as_chain(layer)(torch.eye(36, **F64).reshape(36, 4, 3, 3)).flatten(1).mT.reshape(6, 4, 3, 3)
        - layer.bias.reshape(-1, 1, 1, 1),
    )
    layer.weight.square().sum().backward()
    assert layer.factor0.grad.abs().max() > 0
    with torch.no_grad():
        assert layer.weight.requires_grad
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert "weight" not in dict(layer.named_parameters())
    assert "weight" not in layer.state_dict()


@pytest.mark.parametrize("chain", [{}, {"chain": "CK"}], ids=str)
def test_what_is_written_into_weight_is_composed(chain):
    layer = ExpandNetConv2d(4, 6, 5, **chain, **F64)
    kernel = torch.randn(6, 4, 5, 5, **F64)
    with torch.no_grad():
        layer.weight.copy_(kernel)
        same(layer.kernel(), kernel)
        layer.weight[0] = 0
        layer.weight[1].fill_(3)
        torch._foreach_mul_([layer.weight[2:]], 2)
    kernel = torch.cat([torch.zeros_like(kernel[:1]), torch.full_like(kernel[:1], 3), 2 * kernel[2:]])
    same(layer.kernel(), kernel)
    layer.weight.data.mul_(2)
    same(layer.kernel(), 2 * kernel)
    layer.weight.data = kernel
    same(layer.kernel(), kernel)
    layer.weight = nn.Parameter(kernel + 1)
    same(layer.kernel(), kernel + 1)
    nn.init.constant_(layer.weight, 0.25)
    same(layer.kernel(), torch.full_like(kernel, 0.25))
    assert type(layer.weight * 2) is torch.Tensor
    assert type(copy.deepcopy(layer.weight)) is torch.Tensor


def test_another_shape_cannot_be_assigned():
    layer = ExpandNetConv2d(4, 6, 3)
    message = (
        "ExpandNetConv2d: weight is composed from factor0, factor1, factor2 and becomes what is assigned; expected a "
        "tensor of shape (6, 4, 3, 3), received (6, 1, 3, 3); fold first"
    )
    with pytest.raises(foldconv.UnsupportedError, match=re.escape(message)):
        layer.weight = nn.Parameter(torch.zeros(6, 1, 3, 3))
    kernel = torch.randn(6, 4, 3, 3)
    layer.start_from(kernel)
    same(layer.weight, kernel, 1e-6)


@pytest.mark.parametrize("config", [ExpandNet(), ExpandNet(chain="CK")])
def test_a_plain_state_dict_gives_the_plain_function(config):
    net, other = (nn.Sequential(nn.Conv2d(4, 6, 5, **F64), nn.BatchNorm2d(6, **F64)).eval() for _ in range(2))
    rich = foldconv.expand(net, config)
    randomized(rich[0])
    report = rich.load_state_dict(other.state_dict(), strict=False)
    assert set(report.missing_keys) == {f"0.{name}" for name in rich[0].composed_from}
    assert not report.unexpected_keys
    x = torch.randn(2, 4, 8, 8, **F64)
    same(rich(x), other(x), 1e-12)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight: .* \(6, 4, 3, 3\) .* \(6, 4, 5, 5\)"):
        rich.load_state_dict({"0.weight": torch.zeros(6, 4, 3, 3)}, strict=False)
    both = rich[0].state_dict() | {"weight": torch.zeros(6, 4, 5, 5)}
    assert rich[0].load_state_dict(both, strict=False).unexpected_keys == ["weight"]


def test_a_plain_state_dict_that_does_not_fit_changes_nothing():
    layer = randomized(ExpandNetConv2d(4, 4, 5, rate=2, chain="CK", **F64))
    before = {name: value.clone() for name, value in layer.state_dict().items() if name != "bias"}
    with pytest.raises(RuntimeError, match=re.escape("at least (16,), received (8,)")):
        layer.load_state_dict(nn.Conv2d(4, 4, 5, **F64).state_dict(), strict=False)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


# ---------------------------------------------------------------------- refusals and use


def test_refusals():
    for value in (0, -1, 2.0, True, "4", None):
        with pytest.raises(UnsupportedError, match=re.escape(f"rate: expected an integer ≥ 1, received {value!r}")):
            ExpandNetConv2d(2, 2, 3, rate=value)
    with pytest.raises(UnsupportedError, match="chain: expected 'CL' or 'CK', received 'FC'"):
        ExpandNetConv2d(2, 2, 3, chain="FC")
    for size in (3, 4, (5, 2), 1):
        shown = re.escape(str((size, size) if isinstance(size, int) else size))
        with pytest.raises(UnsupportedError, match=f"odd sizes, one of at least 5; its size is {shown}"):
            ExpandNetConv2d(2, 2, size, chain="CK")
        with pytest.raises(ValueError, match=f"odd sizes, one of at least 5; its size is {shown}"):
            foldconv.expand(nn.Conv2d(2, 2, size), ExpandNet(chain="CK"))
    with pytest.raises(ValueError, match="its kernel has one tap; ExpandNet-CL puts pointwise layers around"):
        foldconv.expand(nn.Conv2d(2, 2, 1), "expandnet")
    with pytest.raises(ValueError, match="chains convolutions that gather; a transposed one scatters"):
        foldconv.expand(nn.ConvTranspose2d(2, 2, 3), "expandnet")
    with pytest.raises(
        UnsupportedError, match=re.escape("at least (32, 32, 32, 32) or (18, 18, 18, 8), received (8, 8, 8, 8)")
    ):
        foldconv.expand(nn.Conv2d(2, 2, 11), ExpandNet(chain="CK"))
    drawn = foldconv.expand(nn.Conv2d(2, 2, 11), ExpandNet(chain="CK"), init="paper")
    assert isinstance(drawn, ExpandNetConv2d)


def test_composition_cost():
    assert ExpandNetConv2d(2, 3, 3, rate=2).composition_cost() == 6 * 4 * 9 * 1 * 2 + 3 * 6 * 1 * 9 * 2
    assert ExpandNetConv2d(2, 3, 5, rate=2, chain="CK").composition_cost() == 3 * 4 * 9 * 9 * 2


def test_repr_tells_the_options():
    assert repr(ExpandNetConv2d(1, 2, 3)).endswith("stride=(1, 1), rate=4, chain='CL')")


def test_tied_convolutions_stay_tied():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, **F64), nn.Conv2d(4, 4, 3, **F64))
    net[1].weight = net[0].weight
    rich = foldconv.expand(net, "expandnet")
    assert rich[0].factor1 is rich[1].factor1
    randomized(rich[0])
    folded = foldconv.fold(rich)
    assert folded[0].weight is folded[1].weight
    x = torch.randn(1, 4, 9, 9, **F64)
    same(folded(x), rich(x))


def test_memory_format_survives():
    net = nn.Sequential(nn.Conv2d(4, 6, 5)).to(memory_format=torch.channels_last)
    for config in (ExpandNet(), ExpandNet(chain="CK")):
        rich = foldconv.expand(net, config)
        assert rich[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert foldconv.fold(rich)[0].weight.stride() == net[0].weight.stride()


def test_meta_device():
    layer = ExpandNetConv2d(4, 6, 5, chain="CK", device="meta")
    assert layer(torch.empty(1, 4, 8, 8, device="meta")).shape == (1, 6, 4, 4)
    for config in (ExpandNet(), ExpandNet(chain="CK")):
        made = foldconv.expand(nn.Conv2d(4, 6, 5, device="meta"), config)
        assert {p.device.type for p in made.parameters()} == {"meta"}
        assert made.weight.shape == (6, 4, 5, 5)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(1, 4, 8, 8))).all()
