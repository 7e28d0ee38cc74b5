"""Between torch's checkpoints and modules: what is matched, what is refused, what the norms and D become."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import foldconv
from foldconv.errors import CheckpointError, UnsupportedError
from foldconv.files.native import read_description
from foldconv.testing import randomize


class Net(nn.Module):
    """A convolution, a grouped, a depthwise and a transposed one, and a linear layer; norms of both kinds."""

    def __init__(self, eps=1e-5, affine=True):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=eps, affine=affine)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.group_norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.grouped(self.norm(self.first(x)).relu())
        return self.head(self.up(self.group_norm(self.depthwise(x))).mean((2, 3)))


@pytest.fixture
def rich():
    torch.manual_seed(0)
    net = foldconv.expand(Net(), foldconv.DOConv(depth_multiplier=12), exclude="up")
    randomize(net)
    return net.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_do_convs_fold_for_a_plain_target_with_another_eps(rich, x, tmp_path):
    plain = Net(eps=1e-3).eval()
    conversion = foldconv.convert_weights(rich, plain)
    same(plain(x), rich(x))
    assert not torch.allclose(plain.norm.weight, rich.norm.weight, rtol=1e-6)
    assert [note.partition(":")[0] for note in conversion.notes] == [
        f"{name} → {name}" for name in ("first", "grouped", "depthwise")
    ]
    assert str(conversion).splitlines()[:2] == ["Net → Net", "  first       →  first"]
    foldconv.save(rich, tmp_path / "rich.safetensors")
    again = Net(eps=1e-3).eval()
    foldconv.convert_weights(tmp_path / "rich.safetensors", again)
    same(again(x), rich(x))


def test_a_plain_source_leaves_D_zero_and_keeps_the_surplus_taps(rich, x):
    plain = Net().eval()
    randomize(plain)
    extra = rich.grouped.weight_extra.clone()
    foldconv.convert_weights(plain, rich)
    same(rich(x), plain(x))
    assert not rich.grouped.D.any()
    assert torch.equal(rich.grouped.weight_extra, extra)


@pytest.mark.parametrize(("source", "target"), [(9, 12), (12, 12), (12, 9), (10, 12)])
def test_other_numbers_of_taps(source, target):
    torch.manual_seed(0)
    one, other = (nn.Sequential(foldconv.DOConv2d(4, 6, 3, groups=2, depth_multiplier=s)) for s in (source, target))
    randomize(one)
    randomize(other)
    x = torch.randn(1, 4, 5, 5)
    notes = foldconv.convert_weights(one, other).notes
    same(other(x), one(x))
    assert bool(notes) == (target < source)
    assert bool(other[0].D.any()) == (target >= source)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_do_conv_folds_from_its_file(tmp_path, groups):
    rich = nn.Sequential(foldconv.DOConvTranspose2d(4, 4, 3, groups=groups, stride=2, depth_multiplier=11))
    randomize(rich)
    foldconv.save(rich, tmp_path / "rich.safetensors")
    plain = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=groups, stride=2))
    foldconv.convert_weights(tmp_path / "rich.safetensors", plain)
    x = torch.randn(1, 4, 5, 5)
    same(plain(x), rich(x))


def test_files_of_all_three_kinds_and_nothing_is_overwritten(rich, x, tmp_path):
    foldconv.save(Net(), tmp_path / "made.safetensors", extra={"epoch": 3})
    for suffix in (".safetensors", ".pt", ".pth"):
        out = tmp_path / f"out{suffix}"
        foldconv.convert_weights(rich, out, like=tmp_path / "made.safetensors")
        net = Net().eval()
        net.load_state_dict(load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True))
        same(net(x), rich(x))
        before = out.read_bytes()
        with pytest.raises(FileExistsError, match="is not overwritten; choose another name"):
            foldconv.convert_weights(rich, out, like=Net())
        assert out.read_bytes() == before
    assert read_description(tmp_path / "out.safetensors")["extra"] == {"epoch": 3}
    foldconv.convert_weights(rich, tmp_path / "module.safetensors", like=Net())
    same(foldconv.load(tmp_path / "module.safetensors", Net()).eval()(x), rich(x))
    assert sorted(os.listdir(tmp_path)) == [
        *("made.safetensors", "module.safetensors", "out.pt", "out.pth", "out.safetensors")
    ]


def random_norm(**options):
    norm = nn.BatchNorm2d(8, **options)
    randomize(norm)
    return norm.eval()


def test_a_norm_without_scale_and_shift_takes_them_into_its_statistics():
    torch.manual_seed(0)
    source, target = random_norm(eps=1e-5), random_norm(eps=1e-3, affine=False)
    source.weight.data.abs_().add_(0.1)
    foldconv.convert_weights(nn.Sequential(source), nn.Sequential(target))
    x = torch.randn(2, 8, 3, 3)
    same(target(x), source(x))
    back = random_norm(eps=1e-3)
    foldconv.convert_weights(nn.Sequential(target), nn.Sequential(back))
    same(back(x), source(x))


@pytest.mark.parametrize(("eps", "weight", "many"), [(1e-5, -1.0, 1), (0.5, 40.0, 8)])
def test_a_scale_that_no_variance_makes_up_for_is_refused(eps, weight, many):
    source, target = random_norm(), random_norm(eps=eps, affine=False)
    source.weight.data.fill_(1.0)
    source.weight.data[:many] = weight
    before = target.running_var.clone()
    with pytest.raises(
        UnsupportedError, match=rf"no scale \(gamma\), and no variance makes up .* {many} of 8 channels"
    ):
        foldconv.convert_weights(nn.Sequential(source), nn.Sequential(target))
    assert torch.equal(target.running_var, before)


def test_a_norm_without_statistics_needs_an_equal_eps():
    source, target = (nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8, eps=e)) for e in (1e-5, 1e-3))
    with pytest.raises(UnsupportedError, match="1 → 1: a norm without running statistics with eps 1e-05 cannot be had"):
        foldconv.convert_weights(source, target)


def test_eps_of_a_file_can_be_given_and_must_not_contradict(tmp_path):
    torch.manual_seed(0)
    source = nn.Sequential(random_norm(eps=0.1))
    torch.save(source.state_dict(), tmp_path / "source.pth")
    target, x = nn.Sequential(random_norm(eps=0.2)), torch.randn(2, 8, 3, 3)
    foldconv.convert_weights(tmp_path / "source.pth", target)
    assert (target(x) - source(x)).abs().max() > 1e-2  # 1e-5 was assumed
    foldconv.convert_weights(tmp_path / "source.pth", target, source_eps=0.1)
    same(target(x), source(x))
    with pytest.raises(UnsupportedError, match=r"0: its eps is 0.2, target_eps says 0.1; leave target_eps out"):
        foldconv.convert_weights(tmp_path / "source.pth", target, target_eps=0.1)


class Residual(nn.Module):
    """Two ways from 4 to 8 channels, in the order that `order` defines them."""

    def __init__(self, order):
        super().__init__()
        for name, module in order.items():
            self.add_module(name, module)


def residual(order="ab"):
    parts = {"a": ("last", "last_norm"), "b": ("skip", "skip_norm")}
    modules = {"stem": nn.Conv2d(3, 4, 3)}
    for way in order:
        modules |= {parts[way][0]: nn.Conv2d(4, 8, 1), parts[way][1]: nn.BatchNorm2d(8)}
    return Residual(modules)


def renamed(net):
    """Its state under other names, in the same order."""
    return {f"other.{name.replace('.', '_x.', 1)}": tensor for name, tensor in net.state_dict().items()}


def test_parallel_branches_of_equal_shapes_are_not_guessed(tmp_path):
    torch.save(renamed(residual()), tmp_path / "source.pth")
    target = residual()
    expected = (
        r"other.last_x \(kernel 8×4×1×1\), other.skip_x \(kernel 8×4×1×1\) could each be any of last \(conv 8×4×1×1\), "
        r"skip .* in Residual, order and shapes do not tell; say which: names=\{'other.last_x': ...\}"
    )
    with pytest.raises(CheckpointError, match=expected):
        foldconv.convert_weights(tmp_path / "source.pth", target)
    with pytest.raises(CheckpointError, match="could each be any of"):  # nor when they change places
        foldconv.convert_weights(tmp_path / "source.pth", residual("ba"))
    swapped = residual("ba")
    names = {"other.last_x": "last"}
    found = foldconv.convert_weights(tmp_path / "source.pth", swapped, names=names).layers
    assert found == {
        "stem": "other.stem_x",
        "last": "other.last_x",
        "last_norm": "other.last_norm_x",
        "skip": "other.skip_x",
        "skip_norm": "other.skip_norm_x",
    }


def test_norms_are_not_paired_by_order_where_kernels_changed_places():
    # The norms come after both kernels: which is whose, no order tells.
    source = Residual({"a": nn.Conv2d(4, 8, 1), "b": nn.Conv2d(4, 8, 3)})
    target = Residual({"d": nn.Conv2d(4, 8, 3), "c": nn.Conv2d(4, 8, 1)})
    for net, names in ((source, "pq"), (target, "rs")):
        for name in names:
            net.add_module(name, nn.BatchNorm2d(8))
    with pytest.raises(
        CheckpointError, match=r"p \(norm 8\), q \(norm 8\) could each be .*another order in the target"
    ):
        foldconv.convert_weights(source, target)
    found = foldconv.convert_weights(source, target, names={"p": "s"}).layers
    assert found == {"d": "b", "c": "a", "r": "q", "s": "p"}


def test_safetensors_tell_no_order_but_numbers(tmp_path):
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(11)))
    randomize(net)
    save_file(net.state_dict(), tmp_path / "numbers.safetensors")
    other = Residual({f"layer_{chr(97 + i)}": nn.Conv2d(4, 4, 3) for i in range(11)})
    foldconv.convert_weights(tmp_path / "numbers.safetensors", other)
    assert torch.equal(other.layer_k.weight, net[10].weight)
    save_file(other.state_dict(), tmp_path / "words.safetensors")
    with pytest.raises(CheckpointError, match=r"or give the module or a .pth file, which tells the order"):
        foldconv.convert_weights(tmp_path / "words.safetensors", net)
    foldconv.save(other, tmp_path / "ours.safetensors")  # whose header has the order
    again = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(11)))
    foldconv.convert_weights(tmp_path / "ours.safetensors", again)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(again, net, strict=True))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([nn.Conv2d(3, 4, 3)], {}, r"no.* counterparts in the source: 0 \(conv 4×3×3×3\); in the target: 0 .*8×3×3×3"),
        ([nn.Conv2d(3, 8, 3), nn.Linear(2, 2)], {}, r"source: 1 \(dense 2×2\); in the target: none; 2 and 1 layers"),
        ([nn.Conv2d(3, 8, 3)], {"names": {"1": "0"}}, "names: the source Sequential: unknown layer '1'"),
        ([nn.Conv2d(3, 8, 3)], {"names": {"0": "o"}}, "names: the target Sequential: unknown layer 'o'"),
        ([nn.Conv2d(3, 8, 1)], {"names": {"0": "0"}}, r"names: 0 \(conv 8×3×1×1\) cannot become 0 \(conv 8×3×3×3\)"),
        ([nn.Conv2d(3, 8, 3), nn.PReLU()], {}, "Sequential: 1: no rule to convert PReLU; expected convolutions"),
        ([nn.Conv2d(3, 8, 3)], {"like": nn.ReLU()}, "like: a model to load into is its own template; leave it out"),
        ([nn.Conv2d(3, 8, 3)], {"flatten": {"0": None}}, "flatten: unknown dense layer of Keras '0'; expected none"),
    ],
)
def test_refusals_say_which_layers_and_shapes(source, options, message):
    target = nn.Sequential(nn.Conv2d(3, 8, 3))
    before = target[0].weight.clone()
    with pytest.raises((CheckpointError, UnsupportedError), match=message) as caught:
        foldconv.convert_weights(nn.Sequential(*source), target, **options)
    assert "\n" not in str(caught.value)
    assert torch.equal(target[0].weight, before)


def test_a_bias_needs_a_place():
    source, target = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))
    with pytest.raises(UnsupportedError, match="0 → 0: the source has a bias that is not trivial, the target has none"):
        foldconv.convert_weights(source, target)
    source[0].bias.data.zero_()
    foldconv.convert_weights(source, target)
    foldconv.convert_weights(target, source)


def test_other_methods_are_folded_in_models_and_refused_in_files(x, tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    rich = foldconv.expand(plain, "orepa").eval()
    target = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    foldconv.convert_weights(rich, target)
    same(target(x), rich(x))
    foldconv.save(rich, tmp_path / "rich.safetensors")
    with pytest.raises(UnsupportedError, match="0: only doconv layers convert, found 'orepa'; fold the network first"):
        foldconv.convert_weights(tmp_path / "rich.safetensors", target)
    with pytest.raises(UnsupportedError, match="give its plain network"):
        foldconv.convert_weights(target, rich)


def test_half_precision_that_overflows_is_refused(tmp_path):
    source, target = nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Sequential(nn.Conv2d(1, 1, 1)).half()
    source[0].weight.data.fill_(1e6)
    with pytest.raises(UnsupportedError, match=r"0.weight: 1 of 1 values are beyond float16; use a target in float32"):
        foldconv.convert_weights(source, target)
    source[0].weight.data.fill_(0.3)
    foldconv.convert_weights(source, target.bfloat16())
    assert target[0].weight.item() == pytest.approx(0.3, rel=1e-2)


def test_files_of_unknown_kinds():
    with pytest.raises(CheckpointError, match=r"a\.h5: expected a name ending in \.keras, \.weights\.h5, \.params"):
        foldconv.convert_weights("a.h5", nn.Sequential())
    with pytest.raises(CheckpointError, match=r"a\.params: no such file; expected a checkpoint of gluon"):
        foldconv.convert_weights("a.params", nn.Sequential())
    with pytest.raises(UnsupportedError, match=r"expected a path, a torch module, a Keras model .*, received int"):
        foldconv.convert_weights(3, nn.Sequential())


def test_equal_names_go_before_order():
    source, target = residual(), residual("ba")
    randomize(source)
    found = foldconv.convert_weights(source, target).layers
    assert list(found) == ["stem", "skip", "skip_norm", "last", "last_norm"]
    assert all(ours == theirs for theirs, ours in found.items())
    assert torch.equal(target.skip.weight, source.skip.weight)


def test_weights_that_are_no_floating_point_numbers(tmp_path):
    for weight, kind in ((torch.ones(2, 3, 3, 3).long(), "int64"), (torch.ones(2, 3, 3, 3) > 0, "bool")):
        torch.save({"conv.weight": weight}, tmp_path / "net.pth")
        with pytest.raises(CheckpointError, match=f"'conv.weight': expected floating point values, received {kind}"):
            foldconv.convert_weights(tmp_path / "net.pth", nn.Sequential(nn.Conv2d(3, 2, 3, bias=False)))
