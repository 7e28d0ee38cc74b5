"""What the methods with norms in branches share: where the norm goes, and that it comes back."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

import foldconv
from foldconv import NoMatchError, UnsupportedError
from foldconv.layers import BranchedConv, NormPlace
from foldconv.methods.dbb import NormThenPad, PaddedWindow
from foldconv.testing import randomize

METHODS = ["repvgg", "acnet", "mobileone", "qarepvgg", "dbb", "orepa_vgg"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def network(norm=None, **conv):
    arguments = {"kernel_size": 3, "padding": 1, "bias": False, **conv}
    layers = [nn.Conv2d(4, 4, **arguments), nn.BatchNorm2d(4) if norm is None else norm, nn.ReLU(), nn.Conv2d(4, 2, 1)]
    net = nn.Sequential(*layers).double().eval()
    randomize(net)
    return net


def without_bias(norm):
    norm.register_parameter("bias", None)
    return norm


def image(*shape):
    return torch.randn(*(shape or (2, 4, 9, 8)), dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_the_norm_moves_in_and_comes_back(self, method):
        net, x = network(), image()
        rich = foldconv.expand(net, method, include="0")
        assert isinstance(rich[0], BranchedConv)
        assert isinstance(rich[1], NormPlace)
        assert not list(rich[1].parameters(recurse=False))
        assert not rich[1].state_dict()
        torch.testing.assert_close(rich(x), net(x), **CLOSE)
        randomize(rich)
        folded = foldconv.fold(rich)
        assert [type(m) for m in folded] == [type(m) for m in net]
        torch.testing.assert_close(folded(x), rich(x), **CLOSE)
        fresh = network()
        fresh.load_state_dict(folded.state_dict())
        torch.testing.assert_close(fresh(x), rich(x), **CLOSE)
        absorbed = foldconv.fold(rich, batchnorm=True)
        assert isinstance(absorbed[1], nn.Identity)
        torch.testing.assert_close(absorbed(x), rich(x), **CLOSE)

    def test_in_training_mode_the_start_is_the_plain_network_too(self, method):
        if method == "qarepvgg":
            return  # its inner norm normalizes by the batch what the identity branch was taken out of
        net, x = network(), image()
        rich = foldconv.expand(net, method, include="0").train()
        torch.testing.assert_close(rich(x), net.train()(x), **CLOSE)

    @pytest.mark.parametrize(
        "norm",
        [
            nn.BatchNorm2d(4, affine=False),
            nn.BatchNorm2d(4, eps=0.1, momentum=None),
            nn.SyncBatchNorm(4),
            without_bias(nn.BatchNorm2d(4)),
        ],
        ids=["affine=False", "large eps", "SyncBatchNorm", "weight without bias"],
    )
    def test_kinds_of_norm(self, method, norm):
        net, x = network(copy.deepcopy(norm)), image()
        rich = foldconv.expand(net, method, include="0").eval()
        torch.testing.assert_close(rich(x), net(x), **CLOSE)
        randomize(rich)
        folded = foldconv.fold(rich)
        assert type(folded[1]) is type(norm)
        assert folded.state_dict().keys() == net.state_dict().keys()
        torch.testing.assert_close(folded(x), rich(x), **CLOSE)

    def test_norms_of_other_libraries(self, method):
        layers = pytest.importorskip("timm.layers")
        frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(4)
        for norm in (layers.BatchNormAct2d(4), frozen):
            net, x = network(norm), image()
            rich = foldconv.expand(net, method, include="0").eval()
            torch.testing.assert_close(rich(x), net(x), **CLOSE)
            randomize(rich)
            folded = foldconv.fold(rich)
            assert type(folded[1]) is type(norm)
            torch.testing.assert_close(folded(x), rich(x), **CLOSE)
            torch.testing.assert_close(foldconv.fold(rich, batchnorm=True)(x), rich(x), **CLOSE)

    def test_sync_norm_conversion_after_expansion(self, method):
        rich, x = foldconv.expand(network(), method, include="0"), image()
        randomize(rich)
        expected = rich(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(rich).eval()
        assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
        torch.testing.assert_close(converted(x), expected, **CLOSE)
        torch.testing.assert_close(foldconv.fold(converted)(x), expected, **CLOSE)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_types(self, method, dtype):
        rich, x = foldconv.expand(network(), method, include="0"), image()
        randomize(rich)
        rich = rich.to(dtype)
        folded = foldconv.fold(rich)
        assert {p.dtype for p in folded.parameters()} == {dtype}
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(folded(x.to(dtype)), rich(x.to(dtype)), rtol=tolerance, atol=tolerance)

    def test_a_frozen_norm_keeps_its_mode_and_frozen_weights_stay_frozen(self, method):
        net = network().train()
        net[1].eval()
        net[0].weight.requires_grad_(False)
        rich = foldconv.expand(net, method, include="0")
        assert not (rich[0].body.norm if method == "qarepvgg" else rich[0].norm).training
        new = [p for n, p in rich[0].named_parameters() if "main" not in n and not n.startswith("body.norm")]
        assert new
        assert not any(p.requires_grad for p in new)
        folded = foldconv.fold(rich)
        assert not folded[0].weight.requires_grad
        assert folded[1].weight.requires_grad

    def test_paper_initialization_starts_every_branch(self, method):
        torch.manual_seed(0)
        rich = foldconv.expand(network(), method, include="0", init="paper")
        norms = [m for m in rich[0].modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) >= 2
        assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in norms)
        # An OREPA kernel draws otherwise, and has a test of its own.
        kernels = [m.weight for m in rich[0].modules() if type(m) is nn.Conv2d]
        for weight in kernels:
            bound = (weight.shape[1] * weight[0, 0].numel()) ** -0.5
            zero = method == "dbb" and not weight.abs().max()  # the 1×1 beside the identity starts at zero
            assert zero or 0.6 * bound < weight.abs().max() <= bound

    def test_save_and_load(self, method, tmp_path):
        net, x = network(), image()
        rich = foldconv.expand(net, method, include="0")
        randomize(rich)
        foldconv.save(rich, tmp_path / "net.safetensors")
        loaded = foldconv.load(tmp_path / "net.safetensors", net).eval()
        assert loaded.state_dict().keys() == rich.state_dict().keys()
        torch.testing.assert_close(loaded(x), rich(x), **CLOSE)

    def test_convolutions_without_a_norm(self, method):
        conv, x = nn.Conv2d(4, 4, 3, padding=1).double(), image()
        rich = foldconv.expand(conv, method).eval()
        torch.testing.assert_close(rich(x), conv(x), **CLOSE)
        randomize(rich)
        torch.testing.assert_close(foldconv.fold(rich)(x), rich(x), **CLOSE)
        with pytest.raises(NoMatchError, match="neither a norm that follows it alone nor a bias is there to take"):
            foldconv.expand(nn.Conv2d(4, 4, 3, bias=False), method)

    def test_what_is_refused(self, method):
        with pytest.raises(NoMatchError, match="branches stand beside plain convolutions only, and it is transposed"):
            foldconv.expand(nn.ConvTranspose2d(4, 4, 3), method)
        bare = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
        with pytest.raises(UnsupportedError, match=r"0: .* the norm that follows it keeps no running statistics"):
            foldconv.expand(bare, method, include="0")
        net = network(bias=True)
        net.append(nn.Conv2d(2, 4, 1)).append(nn.Conv2d(4, 4, 3, padding=1))
        net[-1].weight = net[0].weight
        with pytest.raises(UnsupportedError, match="5 shares its weight with 0"):
            foldconv.expand(net, method, include=["0", "5"])

    def test_an_error_leaves_the_model_alone(self, method, monkeypatch):
        net = network()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        monkeypatch.setattr(foldconv.get_method(method), "silence", lambda *_: 1 / 0)
        monkeypatch.setattr(foldconv.layers.BranchedConv, "train", lambda *_: 1 / 0)
        for init in ("paper", "preserve"):
            with pytest.raises(ZeroDivisionError):
                foldconv.expand(net, method, include="0", init=init, inplace=True)
            assert [type(m) for m in net] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
            assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


def test_the_norm_that_follows_by_data_flow_is_taken_not_the_next_by_name():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn1(self.conv2(self.bn2(self.conv1(x)).relu()))

    net = Crossed().double().eval()
    randomize(net)
    rich, x = foldconv.expand(net, "repvgg"), image()
    assert rich.conv1.norm.weight.tolist() == net.bn2.weight.tolist()
    assert rich.conv2.norm.weight.tolist() == net.bn1.weight.tolist()
    randomize(rich)
    torch.testing.assert_close(foldconv.fold(rich)(x), rich(x), **CLOSE)


def test_a_norm_with_two_readers_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y + self.norm(y)

    net = Twice().double().eval()
    randomize(net)
    rich, x = foldconv.expand(net, "repvgg"), image()
    assert type(rich.norm) is nn.BatchNorm2d
    randomize(rich)
    torch.testing.assert_close(foldconv.fold(rich)(x), rich(x), **CLOSE)


def test_methods_mix_and_one_fold_takes_all():
    net = nn.Sequential(
        *[nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(4)]
    )
    net = net.double().eval()
    randomize(net)
    rich = net
    for i, method in enumerate(["doconv", "repvgg", "dbb", "acnet"]):
        rich = foldconv.expand(rich, method, include=f"{i}.0")
    x = image()
    torch.testing.assert_close(rich(x), net(x), **CLOSE)
    randomize(rich)
    folded = foldconv.fold(rich)
    assert folded.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(folded(x), rich(x), **CLOSE)
    assert [row.method for row in foldconv.summary(rich, x).rows] == ["doconv", "repvgg", "dbb", "acnet"]


def test_summary_counts_branches():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
    found = foldconv.summary(foldconv.expand(net, "repvgg"), (1, 4, 8, 8))
    (row,) = found.rows
    assert row.macs_folded == 4 * 4 * 9 * 64
    assert row.macs_training == 4 * 4 * 9 * 64 + 4 * 4 * 64
    assert row.parameters_training == 4 * 4 * 9 + 4 * 4 + 3 * 8
    assert row.parameters_folded == 4 * 4 * 9 + 8
    assert found.parameters_folded == sum(p.numel() for p in net.parameters())


def test_repvggs_custom_l2_is_the_folded_kernels():
    rich = foldconv.expand(network(), foldconv.RepVGG(custom_l2=0.5), include="0")
    randomize(rich)
    body = rich[0].body
    k3, k1 = body.main.conv.weight, body.point.conv.weight
    expected = 0.0
    for o in range(4):
        s3, s1 = (n.weight[o] / torch.sqrt(n.running_var[o] + n.eps) for n in (body.main.norm, body.point.norm))
        for i in range(4):
            ring = k3[o, i].square().sum() - k3[o, i, 1, 1].square()
            centre = (k3[o, i, 1, 1] * s3 + k1[o, i, 0, 0] * s1).square() / (s3.square() + s1.square())
            expected = expected + 0.25 * (ring + centre)
    penalty = foldconv.regularization(rich)
    torch.testing.assert_close(penalty, expected, **CLOSE)
    penalty.backward()
    assert k1.grad.abs().sum() > 0
    assert body.main.norm.weight.grad is None
    assert foldconv.regularization(foldconv.expand(network(), "repvgg", include="0")) == 0


def test_dbb_pads_with_what_the_norm_makes_of_zero():
    """Zeros instead would be wrong at the border by as much as the inner norm shifts."""
    rich, x = foldconv.expand(network(), "dbb", include="0"), image()
    randomize(rich)
    inner = rich[0].body.stack.norm_and_pad
    inner.norm.bias.data.fill_(10.0)
    torch.testing.assert_close(foldconv.fold(rich)(x), rich(x), **CLOSE)
    y = inner(image(1, 4, 3, 3))
    _, shift = foldconv.algebra.scale_and_shift(inner.norm)
    torch.testing.assert_close(y[0, :, 0, 0], shift, **CLOSE)


GEOMETRIES = [
    {},
    {"stride": 2},
    {"padding": 2},
    {"padding": (0, 1), "stride": (1, 2)},
    {"kernel_size": (3, 5), "padding": "same"},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"groups": 4},
]


def in_a_row(window):
    return nn.Sequential(OrderedDict(window.named_children()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
def test_dbb_without_a_padded_copy_is_its_modules_in_a_row(conv, training, monkeypatch):
    body = foldconv.expand(network(**conv), "dbb", include="0")[0].body
    randomize(body)
    x = image().requires_grad_()
    windows = [branch for branch in body.children() if isinstance(branch, PaddedWindow)]
    assert windows
    for window in windows:
        twin = in_a_row(copy.deepcopy(window)).train(training)
        expected = twin(x)
        probe = torch.randn_like(expected)
        with monkeypatch.context() as patch:
            patch.setattr(NormThenPad, "forward", lambda *_: pytest.fail("the padded copy was made"))
            received = window.train(training)(x)
        torch.testing.assert_close(received, expected, **CLOSE)
        gradients = [
            torch.autograd.grad((y * probe).sum(), [x, *m.parameters()])
            for y, m in ((received, window), (expected, twin))
        ]
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, **CLOSE)
        for (name, a), b in zip(window.named_buffers(), twin.buffers()):
            torch.testing.assert_close(a, b, **CLOSE, msg=name)


def test_dbb_makes_the_padded_copy_where_one_side_pads_more():
    window = foldconv.expand(network(kernel_size=4, padding="same"), "dbb", include="0")[0].body.stack
    randomize(window)
    assert window.norm_and_pad.padding == [(1, 2), (1, 2)]
    x = image()
    torch.testing.assert_close(window(x), in_a_row(window)(x), **CLOSE)


@pytest.mark.parametrize("part", ["norm_and_pad", "second"])
def test_dbb_runs_its_modules_where_somebody_looks(part):
    window, seen = foldconv.expand(network(), "dbb", include="0")[0].body.stack, []
    window.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    window(image())
    assert seen == [part]
    window.get_submodule(part)._forward_hooks.clear()
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    window(image())
    handle.remove()
    assert window.get_submodule(part) in seen


def test_dbb_runs_its_modules_in_half_precision_and_for_transforms(monkeypatch):
    window, x = foldconv.expand(network(), "dbb", include="0")[0].body.stack, image()
    randomize(window)
    ran, original = [], NormThenPad.forward
    with monkeypatch.context() as patch:
        patch.setattr(NormThenPad, "forward", lambda self, y: ran.append(1) or original(self, y))
        window.float()(x.float())
        assert not ran
        with torch.autocast("cpu", dtype=torch.bfloat16):
            window(x.float())
        assert len(ran) == 1
        window.bfloat16()(x.bfloat16())
        assert len(ran) == 2
        window.double()
        gradient = torch.func.grad(lambda x: window(x).sum())(x)
        assert len(ran) == 3
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(window(x).sum(), x)[0], **CLOSE)


@pytest.mark.parametrize(
    ("conv", "names"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), ["main", "point", "average", "stack"]),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), ["main", "average", "stack"]),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), ["main", "point", "stack"]),
    ],
)
def test_dbb_has_the_branches_its_convolution_allows(conv, names):
    rich = foldconv.expand(conv, "dbb")
    assert [name for name, _ in rich.body.named_children()] == names
    if conv.groups == 4:
        assert rich.body.stack.second.in_channels == 8
    assert foldconv.expand(conv, foldconv.DBB(internal_width=16)).body.stack.second.in_channels == 16


@pytest.mark.parametrize(
    ("method", "conv", "message"),
    [
        ("repvgg", nn.Conv2d(2, 2, 1), "its kernel has one tap, which a 1×1 branch would only repeat"),
        ("qarepvgg", nn.Conv2d(2, 2, 1), "its kernel has one tap"),
        ("dbb", nn.Conv2d(2, 2, 1), "its kernel has one tap"),
        (
            foldconv.DBB(internal_width=3),
            nn.Conv2d(4, 4, 3, groups=2),
            "internal_width=3 is no multiple of its 2 groups",
        ),
        ("acnet", nn.Conv2d(2, 2, (1, 3)), r"a strip of its kernel \(1, 3\) is that kernel again"),
        ("acnet", nn.Conv1d(2, 2, 3), r"a strip of its kernel \(3,\)"),
        (foldconv.MobileOne(conv_branches=1), nn.Conv2d(2, 4, 1), "conv_branches=1 adds nothing"),
        ("dilated", nn.Conv2d(2, 2, 7), "it is not depthwise; depthwise_only=False takes it all the same"),
        ("dilated", nn.Conv2d(2, 2, 6, groups=2), "the paper has no small kernels for size 6"),
        ("dilated", nn.Conv2d(2, 2, (5, 7), groups=2), r"it needs a square kernel without dilation, and has \(5, 7\)"),
        (
            foldconv.Dilated(kernel_sizes=(3,), dilations=(4,)),
            nn.Conv2d(2, 2, 7, groups=2),
            "a kernel of 3 taps and dilation 4 has no middle place in one of 7",
        ),
    ],
)
def test_reasons(method, conv, message):
    with pytest.raises(NoMatchError, match=message):
        foldconv.expand(conv, method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: foldconv.MobileOne(conv_branches=0), "conv_branches: expected an integer from 1 to 1000, received 0"),
        (lambda: foldconv.Dilated(kernel_sizes=(3,)), r"expected lists of one length, received \(3,\) and None"),
    ],
)
def test_options(make, message):
    with pytest.raises(UnsupportedError, match=message):
        make()


@pytest.mark.parametrize("size", [5, 7, 9, 11, 13, 15, 17])
def test_dilated_table_fits_its_kernels(size):
    conv, x = nn.Conv2d(2, 2, size, padding=size // 2, groups=2).double(), image(1, 2, 19, 18)
    rich = foldconv.expand(conv, "dilated").eval()
    randomize(rich)
    plain = foldconv.fold(rich)
    assert plain.kernel_size == (size, size)
    torch.testing.assert_close(plain(x), rich(x), **CLOSE)


@pytest.mark.parametrize("method", ["repvgg", "dbb", "mobileone", "qarepvgg", "orepa_vgg"])
def test_no_strided_one_by_one_convolution_of_few_channels_runs(method):
    # Its gradient writes past its memory in torch 2.15, channels last; the plain network has none. Contiguous here.
    class Strides(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default and args[1].shape[2:] == (1, 1):
                seen.append(args[3])
            return func(*args, **(kwargs or {}))

    for options in ({"padding": 2}, {"padding": 1}):
        seen = []
        plain = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, **options, bias=False), nn.BatchNorm2d(8)).double()
        net = foldconv.expand(plain, method)
        randomize(net)
        x = torch.randn(4, 3, 12, 11, dtype=torch.float64)
        with Strides():
            net.train()(x).sum().backward()
            output = net.eval()(x)
        assert all(stride == [1, 1] for stride in seen)
        assert seen
        folded = foldconv.fold(net, batchnorm=True)(x)
        assert (folded - output).abs().max() < 1e-10 * output.abs().max()
        torch.testing.assert_close(pickle.loads(pickle.dumps(net)).eval()(x), output, rtol=1e-12, atol=1e-12)
