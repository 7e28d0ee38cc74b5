"""Permutations move into the layers around them where that is proven right, and stay where it is not."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foldconv
from foldconv import UnsupportedError, absorb_permutations
from foldconv.algebra import Scale, kernel_of
from foldconv.layers.permuted import PERMUTED, PermutedConv1d, PermutedConv2d, PermutedConv3d

F64 = {"dtype": torch.float64}


def shuffled(channels, seed):
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed)).tolist()


def permuted(channels=8, out=8, cls=PermutedConv2d, sides="both", **options):
    orders = {"input_order": shuffled(channels, 1), "output_order": shuffled(out, 2)}
    orders = {name: order for name, order in orders.items() if sides in ("both", name)}
    return cls(channels, out, 3, padding=1, groups=2, **orders, **options)


def randomized(model):
    """Float64, evaluation mode, every number random."""
    torch.manual_seed(5)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for p in model.parameters():
            p.normal_()
    return model


def image(channels=3, size=(9, 8), batch=2):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), **F64)


def orders_left(model):
    kinds = tuple(PERMUTED.values())
    return sum(
        (m.input_order is not None) + (m.output_order is not None) for m in model.modules() if isinstance(m, kinds)
    )


def absorbed(model, x=None, left=0):
    """The model after absorbing; it computes the same, and `left` permutations are still there."""
    model, x = randomized(model), image() if x is None else x
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    result = absorb_permutations(model)
    torch.testing.assert_close(result(x), expected, rtol=1e-10, atol=1e-10)
    assert orders_left(result) == left
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the original was changed"
    return result


# ---------------------------------------------------------------------- the layer


@pytest.mark.parametrize(("cls", "ndim"), [(PermutedConv1d, 1), (PermutedConv2d, 2), (PermutedConv3d, 3)])
@pytest.mark.parametrize("sides", ["both", "input_order", "output_order"])
def test_the_layer_gathers_convolves_and_puts_back(cls, ndim, sides):
    layer = randomized(permuted(cls=cls, sides=sides, padding_mode="replicate"))
    plain = getattr(nn, f"Conv{ndim}d")(8, 8, 3, padding=1, groups=2, padding_mode="replicate", **F64)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = image(8, (5,) * ndim)
    given = x if layer.input_order is None else torch.stack([x[:, c] for c in layer.input_order.tolist()], 1)
    wanted = plain(given)
    if layer.output_order is not None:
        wanted = torch.stack([wanted[:, c] for c in layer.output_order.tolist()], 1)
    assert torch.equal(layer(x), wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel_of(layer)(x), wanted, rtol=1e-12, atol=1e-12)
    assert kernel_of(layer, dtype=None).weight.dtype == torch.float64


def test_the_layer_survives_copies_and_state_dicts():
    layer = randomized(permuted())
    fresh = PermutedConv2d(8, 8, 3, padding=1, groups=2, input_order=range(8), output_order=range(8), **F64)
    fresh.load_state_dict(layer.state_dict())
    for other in (fresh, copy.deepcopy(layer)):
        assert torch.equal(other(image(8)), layer(image(8)))
    assert absorb_permutations(layer.float())(image(8).float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "order"), [("input_order", [0, 1, 2, 2]), ("output_order", [1, 2, 3, 4]), ("input_order", [0, 1, 2])]
)
def test_orders_that_are_no_permutations(name, order):
    message = f"{name}: expected each of the 4 channels 0 ... once, received {order}"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        PermutedConv2d(4, 4, 1, **{name: order})


# ---------------------------------------------------------------------- what absorbs


def test_conv_dgconv_norm_relu_conv():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    rich = foldconv.expand(randomized(net), "dgconv", include="1")
    with torch.no_grad():
        rich[1].gates.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    x = image()
    for batchnorm in (False, True):
        folded = foldconv.fold(rich, batchnorm=batchnorm)
        assert orders_left(folded) == 2
        result = absorb_permutations(folded)
        assert orders_left(result) == 0
        assert (type(result[1]), result[1].groups) == (nn.Conv2d, 4)
        assert set(result.state_dict()) == set(foldconv.fold(net, batchnorm=batchnorm).state_dict())
        torch.testing.assert_close(result(x), rich(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "between",
    [
        [nn.ReLU()],
        [nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.MaxPool2d(2)],
        [nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False), nn.PReLU(8)],
        [Scale(8), nn.Identity(), nn.PReLU(), nn.AvgPool2d(2), nn.Dropout2d()],
        [nn.BatchNorm2d(8), nn.Sequential(nn.GELU(), nn.Upsample(scale_factor=2))],
    ],
    ids=["relu", "norm_silu_pool", "depthwise_prelu", "scale", "nested"],
)
def test_a_permutation_passes_what_treats_channels_alike_or_one_by_one(between):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), *copy.deepcopy(between), permuted(), *copy.deepcopy(between), nn.Conv2d(8, 5, 3, padding=1)
    )
    result = absorbed(net, image(size=(16, 15)))
    assert not any(type(m) is PermutedConv2d for m in result.modules())


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_rank_and_transposed_ends(ndim):
    transposed = getattr(nn, f"ConvTranspose{ndim}d")
    middle = permuted(cls=list(PERMUTED.values())[ndim - 1])
    net = nn.Sequential(transposed(3, 8, 2), middle, nn.ReLU(), transposed(8, 4, 2))
    absorbed(net, image(3, (5,) * ndim))


def test_two_in_a_row_share_one_permutation():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), permuted(), nn.BatchNorm2d(8), permuted(8, 16), nn.Conv2d(16, 2, 1))
    result = absorbed(net, left=1)
    assert type(result[1]) is nn.Conv2d
    assert type(result[3]) is PermutedConv2d


class Bottleneck(nn.Module):
    """One ReLU called three times, functional activations, a residual sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = permuted(), nn.BatchNorm2d(8)
        self.conv3, self.relu = nn.Conv2d(8, 3, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        y = F.relu(self.relu(self.bn1(self.conv1(x))), inplace=True)
        y = torch.tanh(self.relu(self.bn2(self.conv2(y))).sigmoid())
        return self.relu(self.conv3(y) + x)


def test_inside_a_residual_block():
    absorbed(nn.Sequential(Bottleneck(), Bottleneck()))


class Seen(nn.Module):
    """A chain in which one tensor is used once more; `where` says which."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.before, self.norm, self.conv, self.after = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), permuted(), Bridge()

    def forward(self, x):
        a = self.before(x)
        b = self.norm(a)
        c = self.conv(b)
        d = self.after(c)
        more = {"before": a, "norm": b, "conv": c}.get(self.where)
        return d if more is None else (d, more)


class Bridge(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.conv = nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.act(x))


@pytest.mark.parametrize(("where", "left"), [("nowhere", 0), ("before", 1), ("norm", 1), ("conv", 1)])
def test_tensors_that_others_see_keep_their_order(where, left):
    model = randomized(Seen(where))
    x = image()
    result = absorb_permutations(model)
    torch.testing.assert_close(result(x), model(x), rtol=1e-10, atol=1e-10)
    assert orders_left(result) == left


def stays(change, left, build=lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), permuted(), nn.Conv2d(8, 4, 1))):
    net = randomized(build())
    change(net)
    x = image()
    expected = net(x)
    result = absorb_permutations(net)
    torch.testing.assert_close(result(x), expected, rtol=1e-10, atol=1e-10)
    assert orders_left(result) == left
    return result


def tie(net):
    net.append(nn.Conv2d(4, 3, 1, **F64))
    net.append(nn.Conv2d(3, 8, 1, **F64))
    net[5].weight = net[0].weight


def instance_forward(net):
    net[1].forward = lambda x: x * torch.arange(8.0, **F64).reshape(-1, 1, 1)


CHANGES = {
    "nothing": (lambda net: None, 0),
    "a hook on the producer": (lambda net: net[0].register_forward_hook(lambda m, a, y: None), 1),
    "a hook on the activation": (lambda net: net[1].register_forward_pre_hook(lambda m, a: None), 1),
    "a hook on the layer": (lambda net: net[2].register_forward_hook(lambda m, a, y: None), 2),
    "a tied producer": (tie, 1),
    "a forward on the instance": (instance_forward, 1),
    "another module between": (lambda net: net.insert(1, nn.Softmax(dim=1)), 1),
    "a norm over groups": (lambda net: net.insert(3, nn.GroupNorm(2, 8, **F64)), 1),
    "a grouped consumer": (lambda net: net.__setitem__(3, nn.Conv2d(8, 4, 1, groups=4, **F64)), 1),
    "no consumer": (lambda net: net.pop(3), 1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_where_a_permutation_stays(what):
    stays(*CHANGES[what])


def test_a_network_that_begins_and_ends_with_it_keeps_both():
    absorbed(nn.Sequential(permuted()), image(8), left=2)
    assert orders_left(absorb_permutations(permuted())) == 2


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), permuted(), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.conv(self.conv(self.stem(x))))


class Reads(Twice):
    def forward(self, x):
        return self.head(self.conv(self.stem(x))) + self.stem.weight.sum() + self.stem.weight[0, 0]


class Untraceable(Twice):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return self.head(self.conv(self.stem(x)))


class Sometimes(Twice):
    def forward(self, x, scale=None):
        y = self.conv(self.stem(x))
        return self.head(y if scale is None else y * scale)


class SometimesNot(Twice):
    def forward(self, x, plainly=None):
        y = self.conv(self.stem(x))
        if plainly is None:
            y = y * torch.arange(8.0, **F64).reshape(-1, 1, 1)
        return self.head(y)


class MayLeaveItOut(Twice):
    def forward(self, x, scale=None):
        y = self.stem(x)
        return self.head(self.conv(y) if scale is None else y * scale)


class MayReturnBefore(Twice):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.head(self.conv(self.stem(x)))


class CalledAgain(Twice):
    def forward(self, x):
        return self.head(self.conv(self.stem(x))) + self.stem(x)[:, :2]


class Hides(nn.Module):
    """Nobody sees when it calls what it holds."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return self.held(x)[:, :2] if x.sum() < 1e9 else x


class CalledOutOfSight(Twice):
    def __init__(self):
        super().__init__()
        self.hides = Hides(self.stem)

    def forward(self, x):
        return self.head(self.conv(self.stem(x))) + self.hides(x)


class SecondArgument(Twice):
    def forward(self, x):
        return self.head(torch.sub(1.0, self.conv(self.stem(x))))


class Remembers(Twice):
    def forward(self, x):
        self.seen = self.conv(self.stem(x))
        return self.head(self.seen)


class GivenSize(Twice):
    def __init__(self):
        super().__init__()
        self.head = nn.ConvTranspose2d(8, 2, 1, stride=2)

    def forward(self, x):
        size = [2 * x.shape[2], 2 * x.shape[3]]
        return self.head(self.conv(self.stem(x)), output_size=size)


LEFT = {
    Twice: 2,
    Reads: 1,
    Untraceable: 2,
    Sometimes: 1,
    SometimesNot: 1,
    MayLeaveItOut: 2,
    MayReturnBefore: 0,
    CalledAgain: 1,
    CalledOutOfSight: 1,
    SecondArgument: 1,
    Remembers: 1,
    GivenSize: 0,
}


@pytest.mark.parametrize(("cls", "left"), LEFT.items(), ids=lambda value: getattr(value, "__name__", None))
def test_unusual_forwards(cls, left):
    model, x = randomized(cls()), image()
    result = absorb_permutations(model)
    torch.testing.assert_close(result(x), model(x), rtol=1e-10, atol=1e-10)
    assert orders_left(result) == left
    if cls in (Sometimes, SometimesNot, MayLeaveItOut):
        scale = torch.arange(8.0, **F64).reshape(-1, 1, 1)
        torch.testing.assert_close(result(x, scale), model(x, scale), rtol=1e-10, atol=1e-10)


def test_a_sealed_child_of_an_untraceable_model_is_rid_of_its_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 8, 1), permuted(), nn.Conv2d(8, 3, 1))

        def forward(self, x):
            return self.block(x) if x.sum() < 1e9 else x

    absorbed(Outer())


def test_in_place_and_nothing_to_do():
    plain = nn.Sequential(nn.Conv2d(3, 8, 1))
    assert absorb_permutations(plain) is plain
    net = randomized(nn.Sequential(nn.Conv2d(3, 8, 1), permuted(), nn.Conv2d(8, 4, 1)))
    parameters, expected = list(net.parameters()), net(image())
    assert absorb_permutations(net, inplace=True) is net
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters], "an optimizer still holds them"
    torch.testing.assert_close(net(image()), expected, rtol=1e-10, atol=1e-10)


def test_the_mode_and_training_survive():
    """Norms that use the batch treat channels one by one too: the absorbed network trains the same."""
    net = randomized(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), permuted(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    )
    net.train()
    result = absorb_permutations(net)
    assert all(m.training for m in result.modules())
    assert orders_left(result) == 0
    x = image()
    torch.testing.assert_close(result(x), net(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.eval()(x), net.eval()(x), rtol=1e-10, atol=1e-10)


def test_norms_with_activations_of_timm():
    layers = pytest.importorskip("timm.layers")
    for act, left in (("relu", 0), ("silu", 0)):
        norm = layers.BatchNormAct2d(8, act_layer=act)
        absorbed(
            nn.Sequential(nn.Conv2d(3, 8, 1), copy.deepcopy(norm), permuted(), norm, nn.Conv2d(8, 2, 1)), left=left
        )
    norm = layers.BatchNormAct2d(8, act_layer=lambda inplace=False: nn.Softmax(dim=1))
    absorbed(nn.Sequential(nn.Conv2d(3, 8, 1), norm, permuted(), nn.Conv2d(8, 2, 1)), left=1)
