"""`fold` keeps the evaluation-mode function, checks that it did, absorbs only what may be absorbed, and is atomic."""

import copy

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval

import foldconv
from foldconv.algebra import Sum, kernel_of, norms
from foldconv.layers import Foldable
from foldconv.network.fold import TOLERANCE
from foldconv.network.tree import foldable_layers


def randomized(model, seed=0):
    """The model with every parameter and statistic drawn at random, so that nothing is 0, 1 or equal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.is_floating_point():
                    positive = name == "running_var" or (norms.is_norm(module) and name == "weight")
                    draw(tensor, *((0.5, 2.0) if positive else (-0.5, 0.5)))
    return model


def rich(model, **options):
    """Expanded, in float64, with D away from zero."""
    return randomized(foldconv.expand(model, "doconv", **options).double())


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False))


def assert_same(model, folded, *inputs):
    """Equal evaluation-mode functions."""
    model, folded = copy.deepcopy(model).eval(), copy.deepcopy(folded).eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(*inputs), model(*inputs), rtol=1e-10, atol=1e-10)


def image(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


X = image(2, 3, 7, 6)


# ---------------------------------------------------------------------- without norms


@pytest.mark.parametrize("inplace", [False, True])
def test_function_keys_and_classes(inplace):
    plain, model = network(), rich(network())
    reference = copy.deepcopy(model)
    folded = foldconv.fold(model, inplace=inplace)
    assert (folded is model) == inplace
    assert [type(m) for m in folded.modules()] == [type(m) for m in plain.modules()]
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    assert {key: value.shape for key, value in folded.state_dict().items()} == shapes
    assert_same(reference, folded, X)
    # The kernel is another than `weight`: something was composed.
    assert (folded[0].weight - reference[0].weight).abs().max() > 0.1
    if not inplace:
        assert_same(reference, model, X)
        assert len(foldable_layers(model)) == 2


def test_idempotent():
    folded = foldconv.fold(rich(network()))
    again = foldconv.fold(folded)
    assert again.state_dict().keys() == folded.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), folded.state_dict().values()))
    once = foldconv.fold(folded, batchnorm=True)
    twice = foldconv.fold(once, batchnorm=True)
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values()))


@pytest.mark.parametrize("batchnorm", [False, True])
def test_nothing_to_fold(batchnorm):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    modules = list(net)
    assert foldconv.fold(net, inplace=True, batchnorm=batchnorm) is net
    assert list(net) == modules
    copied = foldconv.fold(net, batchnorm=batchnorm)
    assert copied is not net
    assert repr(copied) == repr(net)


def test_plain_convolutions_are_left_alone_without_batchnorm():
    net = network()
    assert foldconv.fold(net, inplace=True)[0] is net[0]
    assert isinstance(net[1], nn.BatchNorm2d)


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_training_mode_model_folds_its_evaluation_function_and_keeps_its_modes(batchnorm, inplace):
    model = rich(network()).train()
    model[1].eval()
    model[3].eval()
    flags = [m.training for m in model]
    statistics = model[1].running_mean.clone()
    reference = copy.deepcopy(model)
    folded = foldconv.fold(model, batchnorm=batchnorm, inplace=inplace)
    assert folded.training
    assert [m.training for m in folded] == flags
    assert_same(reference, folded, X)
    if not inplace:
        assert [m.training for m in model] == flags
        assert torch.equal(model[1].running_mean, statistics)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_narrow_types_are_composed_in_float64_and_cast_last(dtype, batchnorm):
    model = rich(network()).to(dtype)
    folded = foldconv.fold(model, batchnorm=batchnorm)
    exact = foldconv.fold(copy.deepcopy(model).double(), batchnorm=batchnorm)
    assert folded.state_dict().keys() == exact.state_dict().keys()
    for key, value in folded.state_dict().items():
        assert value.dtype == (dtype if value.is_floating_point() else value.dtype)
        assert torch.equal(value, exact.state_dict()[key].to(value.dtype))


def test_composition_in_the_narrow_type_would_differ():
    """The control of the test above."""
    layer = rich(nn.Conv2d(64, 64, 3)).half()
    narrow = layer.compose(layer.weight, layer.D, None)
    assert not torch.equal(foldconv.fold(layer).weight, narrow)


class Two(Foldable):
    """A layer of another kind: no convolution itself, its biases in its branches."""

    def __init__(self):
        super().__init__()
        self.body = Sum(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1))

    def forward(self, x):
        return self.body(x)

    def to_kernel(self, dtype=torch.float64):
        return kernel_of(self.body, dtype=dtype)


def test_layers_that_are_no_convolutions():
    model = nn.Sequential(Two(), nn.BatchNorm2d(3), Two()).double()
    for layer in (model[0], model[2]):
        for conv in layer.body.children():
            nn.init.zeros_(conv.bias)
    folded = foldconv.fold(model)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
    assert folded[0].bias is not folded[2].bias  # equal is not shared
    assert_same(model, folded, X)
    model = randomized(model)
    absorbed = foldconv.fold(model, batchnorm=True)
    assert isinstance(absorbed[1], nn.Identity)
    assert_same(model, absorbed, X)


def test_layers_that_are_no_convolutions_shared():
    model = nn.Sequential(Two(), Two()).double()
    model[1].body = model[0].body
    folded = foldconv.fold(model)
    assert folded[0].weight is folded[1].weight


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "batchnorm", "text"),
    [
        ("0.weight", False, "0: expected a finite kernel"),
        ("0.D", False, "0: expected a finite kernel"),
        ("0.bias", False, "0: expected a finite bias, found 1 of 4"),
        ("3.D", True, "3: expected a finite kernel"),
        ("1.running_mean", True, "0: expected a finite bias, found 1 of 4"),
        ("1.weight", True, "0: expected a finite kernel, found 27 of 108"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_not_finite(value, tensor, batchnorm, text, check):
    model = rich(network())
    model.state_dict()[tensor].view(-1)[0] = value
    modules = list(model.modules())
    with pytest.raises(foldconv.FoldMismatchError, match=f"^{text}.*NaN or infinity"):
        foldconv.fold(model, batchnorm=batchnorm, check=check, inplace=True)
    assert list(model.modules()) == modules


def test_negative_variance():
    model = rich(network())
    model[1].running_var[2] = -1.0
    with pytest.raises(foldconv.FoldMismatchError, match=r"^0: expected a finite kernel, found 27 of 108"):
        foldconv.fold(model, batchnorm=True)


def test_overflow_of_a_narrow_type():
    model = rich(network()).half()
    with torch.no_grad():
        model[3].weight.fill_(60000)
        model[3].D.fill_(1)
    with pytest.raises(foldconv.FoldMismatchError, match=r"^3: .* does not fit torch\.float16; fold in float32"):
        foldconv.fold(model)
    assert foldconv.fold(model.float())[3].weight.abs().max() > 65504


def test_the_root_is_named():
    layer = rich(nn.Conv2d(1, 1, 3))
    with torch.no_grad():
        layer.weight.fill_(float("inf"))
    with pytest.raises(foldconv.FoldMismatchError, match=r"^the root: expected a finite kernel"):
        foldconv.fold(layer)


def break_kernel(monkeypatch, change):
    original = foldconv.DOConv2d.to_kernel
    monkeypatch.setattr(foldconv.DOConv2d, "to_kernel", lambda self, dtype=torch.float64: change(original(self, dtype)))


BROKEN = {
    "values": lambda k: k.replace(weight=k.weight * (1 + 1e-6)),
    "one value": lambda k: k.replace(weight=k.weight.index_fill(0, torch.tensor([0]), 0.0)),
    "transposed": lambda k: k.replace(weight=k.weight.transpose(2, 3)),
    "bias": lambda k: k.replace(bias=torch.full((k.out_channels,), 0.1, dtype=torch.float64)),
    "padding": lambda k: k.replace(padding=((2, 2), (2, 2))),
    "padding mode": lambda k: k.replace(padding=((1, 1), (1, 1)), padding_mode="circular"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_check_catches_a_wrong_kernel_and_names_the_layer(monkeypatch, what, scale):
    model = nn.Sequential(nn.ReLU(), rich(nn.Conv2d(3, 2, 3, padding=1)))
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.mul_(scale)
    modules = list(model)
    foldconv.fold(model)
    break_kernel(monkeypatch, BROKEN[what])
    with pytest.raises(foldconv.FoldMismatchError, match=r"^1: "):
        foldconv.fold(model, inplace=True)
    assert list(model) == modules
    assert type(foldconv.fold(model, check=False)[1]) is nn.Conv2d


def test_check_catches_an_overridden_forward():
    class Doubled(foldconv.DOConv2d):
        def forward(self, x, output_size=None):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 2, 3))
    with pytest.raises(foldconv.FoldMismatchError, match=r"^0: the fold of Doubled differs.*at most \d.*received \d"):
        foldconv.fold(model)


def test_check_catches_wrong_features(monkeypatch):
    monkeypatch.setattr(foldconv.DOConv2d, "feature_forward", lambda self, x: self(x) + 1e-6)
    with pytest.raises(foldconv.FoldMismatchError, match=r"^0: "):
        foldconv.fold(nn.Sequential(rich(nn.Conv2d(3, 2, 3))))


def test_check_runs_a_tree_of_branches_once_unless_its_features_are_its_own(monkeypatch):
    model, runs = nn.Sequential(foldconv.expand(nn.Conv2d(3, 2, 3), "repvgg")), []
    body, original = type(model[0].body), type(model[0].body).forward
    monkeypatch.setattr(body, "forward", lambda self, x: runs.append(x.dtype) or original(self, x))
    foldconv.fold(model)
    assert runs == [torch.float64]
    monkeypatch.setattr(type(model[0]), "feature_forward", lambda self, x: self(x) + 1e-6)
    with pytest.raises(foldconv.FoldMismatchError, match=r"^0: "):
        foldconv.fold(model)


class Weighed(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x) * self.conv.weight.abs().mean()


def test_a_foldable_layer_whose_weight_the_forward_reads_is_refused():
    for inplace in (False, True):
        with pytest.raises(foldconv.UnsupportedError, match=r"^conv: the forward reads its weight"):
            foldconv.fold(Weighed(foldconv.DOConv2d(3, 4, 3)), inplace=inplace)
    assert isinstance(foldconv.fold(Weighed(nn.Conv2d(3, 4, 3))).conv, nn.Conv2d)


def test_check_catches_a_wrong_norm(monkeypatch):
    model = rich(network())
    original = norms.scale_and_shift
    monkeypatch.setattr(norms, "scale_and_shift", lambda norm: tuple(t * 1.001 for t in original(norm)))
    with pytest.raises(foldconv.FoldMismatchError, match=r"^0: "):
        foldconv.fold(model, batchnorm=True)
    foldconv.fold(model, batchnorm=True, check=False)


def test_the_tolerance_leaves_no_room_for_float32():
    assert torch.finfo(torch.float32).eps / 100 > TOLERANCE


def test_an_error_halfway_changes_nothing(monkeypatch):
    model = rich(network())
    handle = model[0].register_load_state_dict_pre_hook(lambda *args: None)
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[3].weight.fill_(float("nan"))
    for batchnorm in (False, True):
        with pytest.raises(foldconv.FoldMismatchError, match=r"^3: "):
            foldconv.fold(model, batchnorm=batchnorm, inplace=True)
    assert list(model.modules()) == modules
    model.load_state_dict(state)  # hooks still know their module
    assert_same(model, foldconv.fold(model, inplace=False), X)
    handle.remove()


def test_unsupported_layer_is_named(monkeypatch):
    def refuse(self, dtype=None):
        raise foldconv.UnsupportedError("it has no exact kernel")

    monkeypatch.setattr(foldconv.DOConv2d, "to_kernel", refuse)
    with pytest.raises(foldconv.UnsupportedError, match=r"^0: it has no exact kernel"):
        foldconv.fold(rich(network()))


# ---------------------------------------------------------------------- absorbing norms: what is absorbed


ABSORBED = {
    "default": nn.BatchNorm2d(4),
    "eps": nn.BatchNorm2d(4, eps=0.1),
    "momentum": nn.BatchNorm2d(4, momentum=0.9),
    "cumulative": nn.BatchNorm2d(4, momentum=None),
    "affine=False": nn.BatchNorm2d(4, affine=False),
    "sync": nn.SyncBatchNorm(4),
    "torchvision frozen": torchvision.ops.FrozenBatchNorm2d(4, eps=1e-3),
    "timm frozen": timm.layers.freeze_batch_norm_2d(nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("kind", ABSORBED)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_absorbed(kind, bias, expanded, seed):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias, padding=1), copy.deepcopy(ABSORBED[kind]), nn.ReLU())
    model = randomized((foldconv.expand(net, "doconv") if expanded else net).double(), seed)
    reference = copy.deepcopy(model)
    folded = foldconv.fold(model, batchnorm=True)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert folded[0].bias is not None
    assert_same(reference, folded, X)


@pytest.mark.parametrize(
    ("conv", "norm", "x"),
    [
        (nn.Conv1d(3, 4, 3, padding=2, dilation=2, padding_mode="circular"), nn.BatchNorm1d(4), image(2, 3, 9)),
        (nn.Conv2d(4, 4, (3, 2), stride=2, groups=4), nn.BatchNorm2d(4), image(2, 4, 9, 8)),
        (nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4), image(2, 3, 9, 8)),
        (nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), image(2, 3, 5, 5, 5)),
        (nn.ConvTranspose1d(3, 4, 4, stride=2), nn.BatchNorm1d(4), image(2, 3, 5)),
        (
            nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, padding=1, output_padding=1),
            nn.BatchNorm2d(4),
            image(2, 6, 5, 4),
        ),
        (nn.ConvTranspose3d(3, 4, 2, bias=False), nn.BatchNorm3d(4), image(2, 3, 3, 3, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("expanded", [False, True])
def test_absorbed_by_any_convolution(conv, norm, x, expanded):
    net = copy.deepcopy(nn.Sequential(conv, norm))
    model = randomized((foldconv.expand(net, "doconv") if expanded else net).double())
    folded = foldconv.fold(model, batchnorm=True)
    assert [type(m) for m in folded] == [type(conv), nn.Identity]
    assert folded[0].weight.shape == conv.weight.shape
    assert_same(model, folded, x)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("kind", ["act", "frozen act", "act and dropout", "no act", "sync act"])
def test_activation_inside_the_norm_is_kept(kind, expanded):
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU, apply_act=kind != "no act")
    if kind == "act and dropout":
        norm.drop = nn.Dropout(0.5)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    if kind == "frozen act":
        net = timm.layers.freeze_batch_norm_2d(net)
    if kind == "sync act":
        net = timm.layers.convert_sync_batchnorm(net)
    model = randomized((foldconv.expand(net, "doconv") if expanded else net).double())
    folded = foldconv.fold(model, batchnorm=True)
    assert type(folded[1]) is {"no act": nn.Identity, "act and dropout": nn.Sequential}.get(kind, nn.SiLU)
    assert_same(model, folded, X)


def test_absorbed_bias_is_trainable_like_the_weight():
    net = network()
    net[0].requires_grad_(False)
    net[0].bias = None
    folded = foldconv.fold(net, batchnorm=True)
    assert (folded[0].weight.requires_grad, folded[0].bias.requires_grad) == (False, False)
    assert folded[3].weight.requires_grad


def test_foldable_layer_with_a_root_of_its_own_and_a_norm_elsewhere():
    """A norm pairs with the convolution that feeds it, wherever either is registered."""

    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(3)])

        def forward(self, x):
            for i in (2, 0, 1):
                x = F.relu(self.norms[(i + 1) % 3](self.convs[i](x)))
            return x

    model = rich(Crossed())
    folded = foldconv.fold(model, batchnorm=True)
    assert not any(norms.is_norm(m) for m in folded.modules())
    assert_same(model, folded, X)


def test_names_that_suggest_a_wrong_pairing():
    class Misnamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn2 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
            self.conv2, self.bn1 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv2(F.relu(self.bn1(F.relu(self.bn2(self.conv1(x))))))

    model = rich(Misnamed())
    folded = foldconv.fold(model, batchnorm=True)
    assert isinstance(folded.bn2, nn.Identity)
    assert isinstance(folded.bn1, nn.BatchNorm2d)
    assert_same(model, folded, X)


# ---------------------------------------------------------------------- absorbing norms: what is not


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)


def residual(self, x):
    y = self.conv(x)
    return self.norm(y) + y


def pre_activation(self, x):
    return self.conv(F.relu(self.norm(x)))


def convolution_twice(self, x):
    return self.norm(self.conv(self.conv(x)))


def norm_twice(self, x):
    return self.norm(self.conv2(F.relu(self.norm(self.conv(x)))))


def activation(self, x):
    return self.norm(F.relu(self.conv(x)))


def functional(self, x):
    return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


def data_dependent(self, x):
    return self.norm(self.conv(x)) if x.mean() > -9 else self.conv(x)


def shape_dependent(self, x):
    return self.norm(self.conv(x)) if x.shape[0] > 1 else self.conv(x)


@pytest.mark.parametrize(
    "forward",
    [residual, pre_activation, convolution_twice, norm_twice, activation, functional, data_dependent, shape_dependent],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_not_absorbed(forward, nested, expanded):
    net = type("Net", (Net,), {"forward": forward})()
    if nested:
        net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), net)
    model = randomized((foldconv.expand(net, "doconv") if expanded else net).double())
    folded = foldconv.fold(model, batchnorm=True)
    inner = folded[2] if nested else folded
    assert isinstance(inner.norm, nn.BatchNorm2d)
    assert not foldable_layers(folded)
    assert not nested or isinstance(folded[1], nn.Identity)
    for batch in (1, 2):
        assert_same(model, folded, image(batch, 3, 6, 6))


def test_not_absorbed_without_statistics():
    model = rich(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))
    folded = foldconv.fold(model, batchnorm=True)
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert type(folded[0]) is nn.Conv2d
    assert_same(model, folded, X)


def test_a_branch_whose_norm_a_fuser_took():
    model = randomized(foldconv.expand(network(), "repvgg", include="0").double()).eval()
    main = model[0].body.main
    main.conv, main.norm = fuse_conv_bn_eval(main.conv, main.norm), nn.Identity()  # as mmcv's goes through a network
    for batchnorm in (False, True):
        assert_same(model, foldconv.fold(model, batchnorm=batchnorm), X)


def test_what_stays_is_told(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model += nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    foldconv.fold(rich(model[:2]))
    foldconv.fold(model[3:5], batchnorm=True)
    assert not caplog.records
    parametrizations.weight_norm(model[0])
    foldconv.fold(model, batchnorm=True)
    (record,) = caplog.records
    assert record.getMessage() == (
        "2 of 3 batch norms stay: 2, 6; 0: its output goes to ReLU, no batch norm module; 5: 6 keeps no running "
        "statistics"
    )


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)]
)
def test_not_absorbed_what_is_another_norm(norm):
    if isinstance(norm, nn.BatchNorm2d):
        norm = type("Squared", (nn.BatchNorm2d,), {"forward": lambda self, x: nn.BatchNorm2d.forward(self, x) ** 2})(4)
    model = rich(nn.Sequential(nn.Conv2d(3, 4, 3), copy.deepcopy(norm)))
    folded = foldconv.fold(model, batchnorm=True)
    assert type(folded[1]) is type(norm)
    assert_same(model, folded, X)


def test_absorbed_when_called_as_a_pair_each_time():
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model = rich(nn.Sequential(block, nn.ReLU(), block))
    folded = foldconv.fold(model, batchnorm=True)
    assert isinstance(folded[0][1], nn.Identity)
    assert folded[0] is folded[2]
    assert_same(model, folded, X)


def test_not_absorbed_when_shared_or_tied():
    norm = nn.BatchNorm2d(3)
    shared = nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.Conv2d(3, 3, 3), norm)
    tied = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    tied[2].weight = tied[0].weight
    for net in (shared, tied):
        model = rich(net)
        folded = foldconv.fold(model, batchnorm=True)
        assert sum(norms.is_norm(m) for m in folded.modules()) == sum(norms.is_norm(m) for m in net.modules())
        assert_same(model, folded, X)
    assert folded[0].weight is folded[2].weight


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_not_absorbed_under_hooks(which, register):
    model = rich(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
    seen = []
    getattr(model[which], register)(lambda module, *args: seen.append(type(module)))
    folded = foldconv.fold(model, batchnorm=True)
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert seen == []
    folded(X.clone().requires_grad_()).sum().backward()
    assert seen == [type(folded[which])]


class Opaque(nn.Module):
    """Cannot be traced: repeats its block as long as the data says so."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        for _ in range(3):
            if float(x.square().mean()) > 0.1:
                x = self.block(x)
        return self.norm(self.conv(x))


@pytest.mark.parametrize("nested", [False, True])
def test_untraceable_parts(nested):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Opaque()) if nested else Opaque()
    model = rich(net)
    folded = foldconv.fold(model, batchnorm=True)
    opaque = folded[2] if nested else folded
    assert isinstance(opaque.block[1], nn.Identity)
    assert isinstance(opaque.norm, nn.BatchNorm2d)
    assert not nested or isinstance(folded[1], nn.Identity)
    for scale in (0.1, 1, 10):
        assert_same(model, folded, X * scale)


def test_detector_whose_root_nobody_can_trace():
    torch.manual_seed(0)
    net = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    names = [name for name, module in net.named_modules() if norms.is_norm(module)]
    folded = foldconv.fold(net, batchnorm=True)
    left = [name for name, module in folded.named_modules() if norms.is_norm(module)]
    assert len(names) == 46
    assert left == []
    x = image(1, 3, 96, 96, dtype=torch.float32)
    with torch.no_grad():
        for a, b in zip(net.eval().backbone(x).values(), folded.eval().backbone(x).values()):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_a_forward_replaced_inside_a_branch_is_named():
    net = foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)), "repvgg")
    net[0].conv.forward = net[0].conv.forward  # as accelerate's hooks do
    with pytest.raises(foldconv.UnsupportedError, match=r"^0: the forward of its body\.main\.conv was replaced"):
        foldconv.fold(net)


def test_a_lazy_norm_is_named():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.LazyBatchNorm2d())
    for use in (lambda: foldconv.expand(net, "repvgg"), lambda: foldconv.fold(net, batchnorm=True)):
        with pytest.raises(foldconv.UnsupportedError, match=r"^1 \(LazyBatchNorm2d\) is lazy .*run the model once"):
            use()


def test_what_mmengine_makes_of_a_synchronized_norm_is_a_norm():
    class _BatchNormXd(nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, input):
            pass

    rich = foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), _BatchNormXd(4)).double(), "repvgg")
    randomized(rich)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for batchnorm in (False, True):
        torch.testing.assert_close(foldconv.fold(rich.eval(), batchnorm=batchnorm)(x), rich(x), rtol=1e-10, atol=1e-10)
