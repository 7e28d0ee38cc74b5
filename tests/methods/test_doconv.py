"""DO-Conv against the paper's definition, written out in loops."""

import copy
import dataclasses
import inspect
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foldconv
from foldconv import DOConv, DOConv1d, DOConv2d, DOConv3d, DOConvTranspose1d, DOConvTranspose2d, DOConvTranspose3d
from foldconv.errors import NoMatchError, UnsupportedError

PLAIN = {
    DOConv1d: nn.Conv1d,
    DOConv2d: nn.Conv2d,
    DOConv3d: nn.Conv3d,
    DOConvTranspose1d: nn.ConvTranspose1d,
    DOConvTranspose2d: nn.ConvTranspose2d,
    DOConvTranspose3d: nn.ConvTranspose3d,
}
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


def by_definition(layer):
    """``K[o, i, m] = Σ_s D[i, m, s] · W[o, i, s]`` with D the identity plus what is stored, entry by entry."""
    taps, multiplier = math.prod(layer.kernel_size), layer.depth_multiplier
    w = layer.weight.detach().flatten(2)
    if layer.weight_extra is not None:
        w = torch.cat([w, layer.weight_extra.detach()], 2)
    kernel = torch.zeros_like(layer.weight).flatten(2)
    channels, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for g, o, i in itertools.product(range(layer.groups), range(outputs), range(channels)):
        source = g * channels + i  # the input channel, whose D applies
        entry = (source, o) if layer.transposed else (g * outputs + o, i)
        for m in range(taps):
            for s in range(multiplier):
                d = layer.D[source, m, s].item() + float(m == s)
                kernel[(*entry, m)] += d * w[(*entry, s)]
    return kernel.reshape(layer.weight.shape)


def with_kernel(layer, kernel):
    """The plain convolution of the layer's arguments with another kernel."""
    cls = next(plain for made, plain in PLAIN.items() if isinstance(layer, made))
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    arguments = {name: getattr(layer, name) for name in names}
    if layer.transposed:
        arguments["output_padding"] = layer.output_padding
    plain = cls(**arguments, bias=layer.bias is not None, dtype=layer.weight.dtype)
    state = {"weight": kernel} | ({} if layer.bias is None else {"bias": layer.bias})
    plain.load_state_dict(state)
    return plain


def example(layer, size=9):
    shape = (2, layer.in_channels, *range(size, size + len(layer.kernel_size)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=layer.weight.dtype)


# ---------------------------------------------------------------------- the composed kernel

CASES = {
    "1d": (DOConv1d, (4, 6, 5), {"padding": 2, "stride": 2}),
    "1d_groups": (DOConv1d, (4, 6, 4), {"groups": 2, "dilation": 2, "bias": False}),
    "1d_depthwise": (DOConv1d, (4, 8, 3), {"groups": 4, "padding": 1}),
    "2d": (DOConv2d, (4, 6, 3), {"padding": 1}),
    "2d_stride_dilation": (DOConv2d, (4, 6, 3), {"padding": (2, 1), "stride": (2, 3), "dilation": (2, 1)}),
    "2d_groups": (DOConv2d, (6, 9, 3), {"groups": 3, "padding": 1}),
    "2d_depthwise": (DOConv2d, (4, 4, 3), {"groups": 4, "stride": 2, "padding": 1, "bias": False}),
    "2d_depthwise_multiplied": (DOConv2d, (3, 9, 3), {"groups": 3, "padding": 1}),
    "2d_even": (DOConv2d, (4, 6, (2, 4)), {"padding": (1, 2)}),
    "2d_rectangular": (DOConv2d, (4, 6, (1, 5)), {"padding": (0, 2), "groups": 2}),
    "2d_same": (DOConv2d, (4, 6, (3, 4)), {"padding": "same", "dilation": (1, 2)}),
    "2d_valid": (DOConv2d, (4, 6, 3), {"padding": "valid"}),
    "2d_reflect": (DOConv2d, (4, 6, (3, 5)), {"padding": (1, 2), "padding_mode": "reflect", "stride": 2}),
    "2d_replicate": (DOConv2d, (4, 6, (3, 5)), {"padding": (1, 2), "padding_mode": "replicate", "groups": 2}),
    "2d_circular": (DOConv2d, (4, 6, (3, 5)), {"padding": (1, 2), "padding_mode": "circular"}),
    "2d_same_reflect": (DOConv2d, (4, 6, (2, 3)), {"padding": "same", "padding_mode": "reflect"}),
    "2d_same_circular": (DOConv2d, (4, 4, (4, 3)), {"padding": "same", "padding_mode": "circular", "groups": 4}),
    "3d": (DOConv3d, (2, 4, (3, 2, 1)), {"padding": (1, 1, 0), "stride": (1, 2, 1)}),
    "3d_groups": (DOConv3d, (4, 2, 2), {"groups": 2, "padding_mode": "replicate", "padding": 1}),
    "transposed_1d": (DOConvTranspose1d, (4, 6, 4), {"stride": 2, "padding": 1, "groups": 2}),
    "transposed_2d": (DOConvTranspose2d, (4, 6, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "transposed_2d_groups": (DOConvTranspose2d, (6, 4, (2, 3)), {"stride": (2, 1), "groups": 2, "dilation": 2}),
    "transposed_2d_depthwise": (DOConvTranspose2d, (4, 8, 3), {"groups": 4, "bias": False}),
    "transposed_3d": (DOConvTranspose3d, (2, 2, 2), {"stride": 2, "groups": 2}),
}


def build(case, multiplier, **more):
    """The layer of a case, randomized; the multiplier is a function of the number of taps."""
    cls, arguments, options = CASES[case]
    size = arguments[2]
    taps = math.prod(size) if isinstance(size, tuple) else size ** {"1": 1, "2": 2, "3": 3}[cls.__name__[-2]]
    return randomized(cls(*arguments, **options, **more, depth_multiplier=multiplier(taps), **F64))


MULTIPLIERS = {"k": lambda k: k, "k+3": lambda k: k + 3, "2k": lambda k: 2 * k}


@pytest.mark.parametrize("multiplier", MULTIPLIERS.values(), ids=MULTIPLIERS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_and_both_compositions_follow_the_definition(case, multiplier):
    layer = build(case, multiplier)
    by_features = build(case, multiplier, composition="feature")
    kernel = by_definition(layer)
    assert (kernel - layer.weight).abs().max() > 0.1
    same(layer.kernel(), kernel)
    same(by_features.kernel(), kernel)

    plain, x = with_kernel(layer, kernel), example(layer)
    results = []
    for module in (plain, layer, by_features):
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.pow(3).mean().backward()
        results.append((y, inputs.grad, module))
    for y, gradient, _ in results[1:]:
        same(y, results[0][0])
        same(gradient, results[0][1])
    for (name, p), q in zip(layer.named_parameters(), by_features.parameters(), strict=True):
        assert p.grad.abs().max() > 0, name
        same(p.grad, q.grad)

    folded = layer.fold()
    assert type(folded) is type(plain)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert str(folded) == str(plain)
    same(folded(x), results[0][0])


@pytest.mark.parametrize("case", ["2d", "2d_groups", "transposed_2d_groups"])
def test_gradients_follow_the_definition(case):
    layer = build(case, lambda k: k + 3)
    g, o, i = layer.groups, layer.out_channels // layer.groups, layer.in_channels // layer.groups
    taps = math.prod(layer.kernel_size)
    weight, extra, d = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.weight_extra, layer.D))
    w = torch.cat([weight.flatten(2), extra], 2)
    full = (torch.eye(taps, taps + 3, **F64) + d).reshape(g, i, taps, taps + 3)
    if layer.transposed:
        kernel = torch.einsum("gims,gios->giom", full, w.reshape(g, i, o, taps + 3))
    else:
        kernel = torch.einsum("gims,gois->goim", full, w.reshape(g, o, i, taps + 3))
    cotangent = torch.randn(layer.weight.shape, **F64)
    wanted = torch.autograd.grad((kernel.reshape(layer.weight.shape) * cotangent).sum(), [weight, extra, d])
    received = torch.autograd.grad((layer.kernel() * cotangent).sum(), [layer.weight, layer.weight_extra, layer.D])
    for got, want in zip(received, wanted, strict=True):
        same(got, want)


@pytest.mark.parametrize("composition", ["kernel", "feature"])
def test_output_size_of_a_transposed_layer(composition):
    layer = randomized(DOConvTranspose2d(4, 6, 3, stride=2, composition=composition, **F64))
    plain, x = with_kernel(layer, by_definition(layer)), example(layer)
    sizes = set()
    for height, width in itertools.product((0, 1), (0, 1)):
        size = [2 * x.shape[2] + 1 + height, 2 * x.shape[3] + 1 + width]
        y = layer(x, output_size=size)
        assert list(y.shape[2:]) == size
        same(y, plain(x, output_size=size))
        sizes.add(y.shape)
    assert len(sizes) == 4
    same(layer(x), plain(x))
    with pytest.raises(ValueError, match=r"requested an output size of \[1, 1\]"):
        layer(x, output_size=[1, 1])


@pytest.mark.parametrize("composition", ["kernel", "feature"])
@pytest.mark.parametrize("case", ["1d", "2d_reflect", "2d_circular", "2d_same", "3d", "transposed_2d", "transposed_1d"])
def test_an_input_without_a_batch(case, composition):
    layer = build(case, lambda k: k, composition=composition)
    x = example(layer)[0]
    y = layer(x)
    same(y, with_kernel(layer, by_definition(layer))(x))
    same(y, layer(x[None])[0])


def test_composition_cost_is_that_of_the_paper():
    # Multiply-adds of Dᵀ ∘ W: D_mul · (M·N) · Cout · Cin / groups.
    assert DOConv2d(8, 6, 3).composition_cost() == 9 * 9 * 6 * 8
    assert DOConv2d(8, 6, 3, depth_multiplier=12, groups=2).composition_cost() == 12 * 9 * 6 * 4
    assert DOConv2d(8, 6, 1).composition_cost() == 0


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("cls", "size", "multiplier", "taps", "shown"),
    [
        (DOConv2d, 3, 8, 9, "(3, 3)"),
        (DOConv2d, (2, 5), 1, 10, "(2, 5)"),
        (DOConv1d, 4, 0, 4, "(4,)"),
        (DOConv3d, 2, -8, 8, "(2, 2, 2)"),
        (DOConvTranspose2d, 2, 3, 4, "(2, 2)"),
        (DOConv2d, 3, True, 9, "(3, 3)"),
        (DOConv2d, 1, True, 1, "(1, 1)"),
        (DOConv2d, 3, 9.0, 9, "(3, 3)"),
        (DOConv2d, 3, "9", 9, "(3, 3)"),
        (DOConv2d, 3, (9,), 9, "(3, 3)"),
        (DOConv2d, 3, math.nan, 9, "(3, 3)"),
    ],
)
def test_a_multiplier_that_cannot_be_is_refused(cls, size, multiplier, taps, shown):
    message = (
        f"depth_multiplier: expected an integer ≥ {taps}, the taps of a kernel of size {shown}, "
        f"received {multiplier!r}; fewer could not express every kernel"
    )
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        cls(4, 4, size, depth_multiplier=multiplier)
    with pytest.raises(ValueError, match="expected an integer"):
        cls(4, 4, size, depth_multiplier=multiplier)


def test_expand_with_too_small_a_multiplier_leaves_the_model():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 5))
    with pytest.raises(UnsupportedError, match=r"expected an integer ≥ 25, .* \(5, 5\), received 12"):
        foldconv.expand(net, DOConv(depth_multiplier=12), inplace=True)
    assert [type(m) for m in net] == [nn.Conv2d, nn.Conv2d]


def test_an_unknown_composition_is_refused():
    with pytest.raises(UnsupportedError, match="composition: expected 'kernel' or 'feature', received 'fast'"):
        DOConv2d(4, 4, 3, composition="fast")


@pytest.mark.parametrize(("made", "plain"), PLAIN.items(), ids=lambda c: c.__name__)
def test_arguments_are_those_of_the_plain_layer_in_its_order(made, plain):
    common = (4, 8, 3, 2, 1)
    rest = (1, 2, False, 1) if made.__name__.startswith("DOConvT") else (1, 2, False)
    layer, wanted = made(*common, *rest, depth_multiplier=40), plain(*common, *rest)
    assert isinstance(layer, plain)
    assert repr(layer) == repr(wanted).replace(plain.__name__, made.__name__)[:-1] + ", depth_multiplier=40)"
    assert layer.weight.shape == wanted.weight.shape
    assert layer.bias is None
    assert layer(example(layer)).shape == wanted(example(layer)).shape
    assert repr(layer.fold()) == repr(wanted)
    # Tools read the signature: IDEs, command line builders, torch's own skip_init.
    ours, theirs = inspect.signature(made).parameters, inspect.signature(plain).parameters
    assert list(ours) == [*theirs, "depth_multiplier", "composition"]
    assert [ours[name] for name in theirs] == list(theirs.values())
    assert ours["depth_multiplier"].kind is inspect.Parameter.KEYWORD_ONLY
    assert nn.utils.skip_init(made, 4, 8, 3, device="cpu").D.shape[0] == 4


def test_repr_tells_the_composition():
    assert repr(DOConv2d(1, 2, 3, composition="feature")) == (
        "DOConv2d(1, 2, kernel_size=(3, 3), stride=(1, 1), depth_multiplier=9, composition='feature')"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_argument(dtype):
    layer = DOConv2d(4, 6, 3, depth_multiplier=12, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert {p.dtype for p in layer.fold().parameters()} == {dtype}
    assert layer.kernel().dtype == dtype


def test_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert {p.dtype for p in DOConv2d(4, 6, 3).parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["argument", "context"])
def test_meta_device(how):
    if how == "argument":
        layer = DOConv2d(4, 6, 3, depth_multiplier=12, device="meta", **F64)
    else:
        with torch.device("meta"):
            layer = DOConv2d(4, 6, 3, depth_multiplier=12, **F64)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    for mode in (True, False):
        y = layer.train(mode)(torch.empty(2, 4, 8, 8, device="meta", **F64))
        assert y.shape == (2, 6, 6, 6)
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    same(layer(example(layer)), F.conv2d(example(layer), layer.weight, layer.bias))


# ---------------------------------------------------------------------- one tap


@pytest.mark.parametrize("composition", ["kernel", "feature"])
@pytest.mark.parametrize("cls", PLAIN, ids=lambda c: c.__name__)
def test_one_tap_is_a_plain_convolution(cls, composition):
    layer = cls(4, 8, 1, stride=2, groups=2, composition=composition, **F64)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.depth_multiplier == 1
    plain, x = with_kernel(layer, layer.weight), example(layer)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), plain(x))
        layer(x).sum().backward()
    assert layer.weight.grad.abs().max() > 0
    folded = layer.fold()
    assert type(folded) is PLAIN[cls]
    assert torch.equal(folded(x), plain(x))
    with torch.no_grad():
        layer.weight.mul_(2)
        same(layer(x), with_kernel(layer, layer.weight)(x))


def test_expand_leaves_one_tap_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (1, 3)))
    made = foldconv.expand(net, "doconv")
    assert [type(m) for m in made] == [DOConv2d, nn.Conv2d, DOConv2d]
    with pytest.raises(NoMatchError, match="its kernel has one tap, where D would add nothing"):
        foldconv.expand(net[1], "doconv")
    with pytest.raises(UnsupportedError, match="1: Conv2d cannot become doconv: its kernel has one tap"):
        foldconv.expand(net, "doconv", include="1")


# ---------------------------------------------------------------------- initialization


@pytest.mark.parametrize("multiplier", MULTIPLIERS.values(), ids=MULTIPLIERS)
@pytest.mark.parametrize(("made", "plain"), PLAIN.items(), ids=lambda c: c.__name__)
def test_a_new_layer_is_the_convolution_of_its_weight(made, plain, multiplier):
    size = 2 if made.__name__.endswith("3d") else 3
    taps = size ** int(made.__name__[-2])
    torch.manual_seed(3)
    wanted = plain(4, 6, size, groups=2, **F64)
    torch.manual_seed(3)
    layer = made(4, 6, size, groups=2, depth_multiplier=multiplier(taps), **F64)
    assert torch.equal(layer.weight, wanted.weight), "the same numbers from the same seed"
    assert torch.equal(layer.bias, wanted.bias)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(example(layer)), wanted(example(layer)))
    with torch.no_grad():
        randomized(layer).reset_parameters()
    assert layer.D.abs().max() == 0
    assert torch.equal(layer.kernel(), layer.weight)


@pytest.mark.parametrize("made", [DOConv2d, DOConvTranspose2d])
def test_initial_distribution_is_that_of_the_plain_layer(made):
    torch.manual_seed(0)
    options = {"depth_multiplier": 18, "groups": 2, **F64}
    layer, plain = made(32, 64, 3, **options), PLAIN[made](32, 64, 3, groups=2, **F64)
    bound = plain.weight.abs().max()
    for values in (layer.weight, layer.weight_extra):
        assert values.std().item() == pytest.approx(plain.weight.std().item(), rel=0.02)
        assert values.abs().max().item() == pytest.approx(bound.item(), rel=0.01)
        assert values.mean().abs() < bound / 50
    assert layer.bias.abs().max() <= plain.bias.abs().max() * 1.2


@pytest.mark.parametrize(
    "initialize", [nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.orthogonal_, nn.init.dirac_]
)
def test_initializers_reach_the_weight(initialize):
    def apply(m):
        if isinstance(m, nn.Conv2d):
            torch.manual_seed(5)
            initialize(m.weight)
            nn.init.zeros_(m.bias)

    plain, layer = nn.Conv2d(4, 6, 3, **F64), DOConv2d(4, 6, 3, depth_multiplier=12, **F64)
    layer.eval()(example(layer))
    plain.apply(apply)
    layer.apply(apply)
    assert torch.equal(layer.weight, plain.weight)
    same(layer(example(layer)), plain(example(layer)))


def test_expand_keeps_or_draws_the_weight():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **F64)
    original = copy.deepcopy(conv)
    for config in (DOConv(), DOConv(depth_multiplier=20), DOConv(composition="feature")):
        kept = foldconv.expand(conv, config)
        assert torch.equal(kept.weight, original.weight)
        same(kept(example(conv)), original(example(conv)))
        drawn = foldconv.expand(conv, config, init="paper")
        assert not torch.equal(drawn.weight, original.weight)
        same(drawn(example(conv)), F.conv2d(example(conv), drawn.weight, drawn.bias))
        assert torch.equal(conv.weight, original.weight)
        assert dataclasses.asdict(kept.method) == {
            "depth_multiplier": config.depth_multiplier or 9,
            "composition": config.composition,
        }


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("case", ["2d", "2d_groups", "2d_depthwise", "1d", "3d", "transposed_2d", "2d_same_reflect"])
@pytest.mark.parametrize("composition", ["kernel", "feature"])
def test_every_parameter_has_a_gradient_within_two_steps(case, composition):
    layer = build(case, lambda k: k + 3, composition=composition)
    layer.reset_parameters()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    largest = dict.fromkeys(dict(layer.named_parameters()), 0.0)
    assert set(largest) >= {"weight", "D", "weight_extra"}
    for _ in range(2):
        optimizer.zero_grad()
        layer(example(layer)).pow(2).mean().backward()
        for name, p in layer.named_parameters():
            largest[name] = max(largest[name], p.grad.abs().max().item())
        optimizer.step()
    assert min(largest.values()) > 1e-6, largest
    assert layer.D.abs().max() > 1e-7


def test_weight_decay_pulls_to_the_plain_convolution():
    layer = randomized(DOConv2d(4, 6, 3, depth_multiplier=12, **F64))
    optimizer = torch.optim.SGD(foldconv.parameter_groups(layer, 0.5)[:1], lr=0.1)
    assert any(p is layer.D for p in optimizer.param_groups[0]["params"])
    distances = []
    for _ in range(40):
        distances.append(((layer.kernel() - layer.weight).norm() / layer.weight.norm()).item())
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.2 * distances[0]


def test_training_is_not_that_of_the_plain_convolution():
    """The over-parameterized layer takes other steps, and its fold has learned them."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, **F64)
    layer = foldconv.expand(plain, "doconv")
    for module in (plain, layer):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            (module(example(plain)) - 1).square().mean().backward()
            optimizer.step()
    x = example(plain)
    assert (layer(x) - plain(x)).abs().max() > 1e-3
    same(foldconv.fold(layer)(x), layer(x))


def test_tensors_put_in_between_forward_and_backward_are_refused():
    pytest.importorskip("numba")
    for name in ("weight", "D"):
        layer = DOConv2d(8, 8, 3)
        y = [layer(torch.randn(1, 8, 5, 5)) for _ in range(2)][1]
        p = getattr(layer, name)
        p.data = p.data[:2].clone()
        with pytest.raises(foldconv.UnsupportedError, match="between the forward and the backward"):
            y.sum().backward()
