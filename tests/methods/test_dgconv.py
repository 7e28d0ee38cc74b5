"""DGConv against the paper's mask, written out entry by entry. What the original computes: tests/checkpoints."""

import inspect
import itertools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import foldconv
from foldconv import DGConv, DGConv1d, DGConv2d, DGConv3d
from foldconv.algebra import Kernel, kernel_of
from foldconv.errors import NoMatchError, UnsupportedError
from foldconv.layers.permuted import PERMUTED, PermutedConv2d
from foldconv.methods.dgconv import budget_objective, complexity

F64 = {"dtype": torch.float64}
PLAIN = {DGConv1d: nn.Conv1d, DGConv2d: nn.Conv2d, DGConv3d: nn.Conv3d}


def same(received, wanted, tolerance=1e-10):
    torch.testing.assert_close(received, wanted, rtol=tolerance, atol=tolerance)


def with_gates(layer, *gates):
    """The layer with these gates (True: open) and other random values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        layer.gates.copy_(torch.tensor([1.0 if gate else -1.0 for gate in gates]) * torch.rand(len(gates)).add(0.1))
    return layer


def example(layer, size=7):
    shape = (2, layer.in_channels, *range(size, size + len(layer.kernel_size)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=layer.weight.dtype)


def mask_by_definition(layer, gates):
    """U for the whole layer, ``(out, in)``, entry by entry: a product over the factors' entries."""
    values = sorted(gates) if layer.sort else list(gates)
    number, groups = len(values), layer.groups
    out, channels = layer.out_channels // groups, layer.in_channels // groups
    mask = torch.zeros(layer.out_channels, layer.in_channels, **F64)
    for group, o, i in itertools.product(range(groups), range(out), range(channels)):
        row, column, entry = o // (out // 2**number), i // (channels // 2**number), 1.0
        for k, g in enumerate(values):
            place = 2 ** (number - 1 - k)
            same_half = row // place % 2 == column // place % 2
            entry *= g * 1 + (1 - g) * (1 if same_half else 0)
        mask[group * out + o, group * channels + i] = entry
    return mask


def dense(weight, groups):
    return Kernel(weight).replace(groups=groups).grouped(1).weight


def all_gates(number):
    return list(itertools.product((False, True), repeat=number))


# ---------------------------------------------------------------------- the mask

SHAPES = {  # in, out, groups, K
    "paper": (8, 8, 1, 3),
    "paper_16": (16, 16, 1, 4),
    "wider": (8, 24, 1, 3),
    "narrower": (24, 8, 1, 3),
    "no_powers": (12, 20, 1, 2),
    "odd_blocks": (6, 6, 1, 1),
    "groups": (24, 16, 2, 2),
    "groups_of_no_powers": (18, 30, 3, 1),
}


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_kernel_and_fold_by_definition_for_every_choice_of_gates(shape, sort):
    channels, out, groups, number = SHAPES[shape]
    for gates in all_gates(number):
        layer = with_gates(DGConv2d(channels, out, 2, groups=groups, sort=sort, **F64), *gates)
        assert layer.gates.shape == (number,)
        mask = mask_by_definition(layer, gates)
        same(dense(layer.mask()[..., None, None], groups)[..., 0, 0], mask, 0)
        kernel = dense(layer.weight, groups) * mask[..., None, None]
        same(dense(layer.kernel(), groups), kernel, 0)
        # The ones of U, and its connected parts: equal groups, 2^(K - Σg) in each group of the convolution.
        total = groups * 2 ** (number - sum(gates))
        assert layer.complexity().item() == mask.sum().item() == channels * out / total
        folded, x = layer.fold(), example(layer)
        assert folded.groups == total
        assert folded.weight.shape == (out, channels // total, 2, 2)
        same(folded(x), F.conv2d(x, kernel, layer.bias))
        same(kernel_of(folded).grouped(1).weight, kernel, 0)
        same(layer.feature_forward(x), layer(x), 0)
        assert not sort or type(folded) is nn.Conv2d, "sorted groups lie side by side"


def test_the_papers_complexity():
    for gates in all_gates(4):
        assert with_gates(DGConv2d(16, 16, 3), *gates).complexity().item() == 2 ** (4 + sum(gates))


@pytest.mark.parametrize(
    ("gates", "permuted"),
    [((0, 0, 0), False), ((0, 1, 1), False), ((0, 0, 1), False), ((1, 0, 1), True), ((1, 1, 0), True)],
)
def test_only_interleaved_groups_are_permuted(gates, permuted):
    folded = with_gates(DGConv2d(8, 16, 3), *gates).fold()
    assert type(folded) is (PermutedConv2d if permuted else nn.Conv2d)
    assert set(folded.state_dict()) == {"weight", "bias"} | ({"input_order", "output_order"} if permuted else set())


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_gate_of_exactly_zero_is_open(zero):
    layer = DGConv2d(4, 4, 3)
    with torch.no_grad():
        layer.gates.copy_(torch.tensor([zero, -1e-30]))
    assert torch.equal(layer.mask(), mask_by_definition(layer, (True, False)).float())
    assert torch.equal(layer.kernel(), layer.weight * layer.mask()[..., None, None])
    assert layer.fold().groups == 2
    with torch.no_grad():
        layer.gates.zero_()
    assert layer.mask().all()
    layer.kernel().sum().backward()
    assert layer.gates.grad.abs().min() > 0, "the straight-through gradient reaches it"


@pytest.mark.parametrize("channels", [(1, 1), (1, 8), (3, 5), (4, 7)])
def test_without_a_common_power_of_two_it_is_a_plain_convolution(channels):
    layer = DGConv2d(*channels, 3, **F64)
    assert layer.gates is None
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = example(layer)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias))
    assert type(layer.fold()) is nn.Conv2d
    assert layer.mask().all()
    assert layer.regularization() is None
    assert layer.complexity().item() == math.prod(channels)
    layer.draw_gates()


# ---------------------------------------------------------------------- gradients

SMALL = [(8, 8, 1, False), (8, 8, 1, True), (12, 8, 2, False), (12, 8, 2, True)]


@pytest.mark.parametrize(("channels", "out", "groups", "sort"), SMALL)
def test_gates_get_the_gradient_of_the_mask_at_zero_and_one(channels, out, groups, sort):
    """Straight through: U is differentiated as the polynomial that it is, at the binary gates."""
    layer = DGConv2d(channels, out, 1, groups=groups, sort=sort, **F64)
    number = len(layer.gates)
    for gates in all_gates(number):
        with_gates(layer, *gates).zero_grad()
        cotangent = torch.randn(layer.weight.shape, **F64)
        (layer.kernel() * cotangent).sum().backward()
        # Differences of the polynomial are its derivative: it is linear in each gate. Sorting moves the values.
        order = sorted(range(number), key=lambda k: gates[k]) if sort else range(number)
        unsorted = DGConv2d(channels, out, 1, groups=groups, **F64)
        values = [float(gates[k]) for k in order]
        for place, k in enumerate(order):
            ends = [mask_by_definition(unsorted, [*values[:place], g, *values[place + 1 :]]) for g in (0.0, 1.0)]
            slope = (ends[1] - ends[0])[..., None, None] * dense(layer.weight * cotangent, groups)
            same(layer.gates.grad[k], slope.sum())


@pytest.mark.parametrize("sort", [False, True])
def test_a_forward_changes_nothing_but_its_output(sort):
    layer = with_gates(DGConv2d(8, 8, 3, sort=sort), 1, 0, 1)
    before = {name: (p.detach().clone(), p._version) for name, p in layer.named_parameters()}
    for mode in (True, False):
        output = layer.train(mode)(example(layer))
        assert type(output) is torch.Tensor
        output.sum().backward()
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p._version == before[name][1]


@pytest.mark.parametrize("sort", [False, True])
def test_exports_and_compiles(sort):
    layer = with_gates(DGConv2d(8, 8, 3, sort=sort), 1, 0, 1).eval()
    x = example(layer)
    with torch.no_grad():
        expected = layer(x)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    compiled = torch.compile(layer.train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    folded = layer.fold().eval()
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), expected)
    torch.compiler.reset()


# ---------------------------------------------------------------------- the fold

FOLDS = {
    "1d": (DGConv1d, (8, 8, 5), {"padding": 2, "stride": 2}),
    "2d": (DGConv2d, (8, 16, 3), {"padding": 1, "bias": False}),
    "2d_strided": (DGConv2d, (16, 8, 3), {"padding": (2, 1), "stride": (2, 3), "dilation": (2, 1)}),
    "2d_groups": (DGConv2d, (16, 32, 3), {"groups": 2, "padding": 1}),
    "2d_reflect": (DGConv2d, (8, 8, (3, 5)), {"padding": (1, 2), "padding_mode": "reflect"}),
    "2d_same": (DGConv2d, (8, 8, 4), {"padding": "same"}),
    "3d": (DGConv3d, (8, 8, 2), {"padding": 1}),
}


@pytest.mark.parametrize("case", FOLDS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_interleaved_gates_fold_exactly(case):
    cls, arguments, options = FOLDS[case]
    layer = with_gates(cls(*arguments, **options, **F64), 1, 0, 1).eval()
    x = example(layer)
    folded = foldconv.fold(layer)
    assert type(folded) is PERMUTED[PLAIN[cls]]
    assert isinstance(folded, PLAIN[cls])
    assert folded.groups == 2 * layer.groups
    same(folded(x), layer(x))
    same(folded(x[0]), layer(x[0]))
    for name in ("stride", "padding", "dilation", "padding_mode"):
        assert getattr(folded, name) == getattr(layer, name)
    again = foldconv.fold(folded)
    assert again.state_dict().keys() == folded.state_dict().keys()


def test_fold_with_a_norm_and_in_half_precision():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)).double().eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    rich = foldconv.expand(net, "dgconv")
    with_gates(rich[0], 1, 0, 0)
    x = example(rich[0])
    folded = foldconv.fold(rich, batchnorm=True)
    same(folded(x), rich(x))
    assert [type(m) for m in folded] == [PermutedConv2d, nn.Identity]
    half = foldconv.fold(rich.to(torch.bfloat16))
    assert half[0].weight.dtype == torch.bfloat16
    assert half[0].input_order.dtype == torch.int64


def test_flags_survive_the_fold():
    layer = with_gates(DGConv2d(16, 16, 3), 1, 0, 0, 1).to(memory_format=torch.channels_last).eval()
    layer.weight.requires_grad_(False)
    folded = layer.fold()
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded.weight.is_contiguous()
    assert not folded.weight.requires_grad
    assert folded.bias.requires_grad
    assert not folded.training


def test_a_fold_that_grouped_wrongly_is_caught(monkeypatch):
    layer = with_gates(DGConv2d(8, 8, 3), 1, 0, 1)
    right = DGConv2d.realize

    def wrong(self, kernel):
        folded = right(self, kernel)
        folded.output_order = folded.output_order.flip(0)
        return folded

    monkeypatch.setattr(DGConv2d, "realize", wrong)
    with pytest.raises(foldconv.FoldMismatchError, match="the root: the fold of DGConv2d differs from the layer"):
        foldconv.fold(layer)


def test_without_values_it_folds_as_the_dense_convolution():
    folded = foldconv.fold(DGConv2d(8, 8, 3, device="meta"))
    assert (type(folded), folded.groups, folded.weight.device.type) == (nn.Conv2d, 1, "meta")


def test_summary_shows_the_multiply_adds_that_folding_saves():
    layer = with_gates(DGConv2d(8, 8, 3, padding=1, bias=False), 1, 0, 0)
    (row,) = foldconv.summary(layer, (1, 8, 5, 5)).rows
    assert row.parameters_training == 8 * 8 * 9 + 3
    assert row.parameters_folded == 8 * 2 * 9
    # The masked convolution is dense; composing costs the Kronecker products and the mask.
    assert row.macs_training == 25 * 8 * 8 * 9 + (8 * 8 * 9 + 16 + 64)
    assert row.macs_folded == 25 * 8 * 2 * 9
    (folded,) = foldconv.summary(layer.fold(), (1, 8, 5, 5)).rows
    assert folded.macs_training == folded.macs_folded == row.macs_folded


# ---------------------------------------------------------------------- training


def test_new_layers_are_the_convolution_of_their_weight():
    for made, plain in PLAIN.items():
        torch.manual_seed(3)
        wanted = plain(4, 8, 3, groups=2, **F64)
        torch.manual_seed(3)
        layer = made(4, 8, 3, groups=2, **F64)
        assert torch.equal(layer.weight, wanted.weight)
        assert torch.equal(layer(example(layer)), wanted(example(layer)))
        assert (layer.gates > 0).all()


def test_paper_initialization_is_the_originals():
    torch.manual_seed(100)
    conv = nn.Conv2d(1024, 1024, 1)
    drawn = []
    for seed in range(30):
        torch.manual_seed(seed)
        layer = foldconv.expand(conv, "dgconv", init="paper")
        assert torch.equal(layer.gates.abs(), torch.full((10,), 1e-8)), "a sign times 1e-8"
        drawn.append(layer.gates.detach() > 0)
    opened = torch.stack(drawn).float()
    assert 0.4 < opened.mean() < 0.6
    assert len({tuple(row.tolist()) for row in opened}) > 25
    torch.manual_seed(0)
    again = foldconv.expand(conv, "dgconv", init="paper")
    assert torch.equal(again.gates > 0, drawn[0]), "torch's generator decides"
    assert not torch.equal(again.weight, conv.weight)
    assert again.weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_are_drawn_in_every_dtype(dtype):
    layer = DGConv2d(1024, 1024, 1, dtype=dtype)
    torch.manual_seed(0)
    layer.draw_gates()
    assert 0 < (layer.gates < 0).sum() < 10
    assert (layer.gates != 0).all()
    assert layer.gates.abs().max() < 1e-4


def test_gates_are_trained_and_do_not_decay():
    layer = foldconv.expand(nn.Conv2d(8, 8, 3, padding=1), "dgconv")
    decayed, kept = foldconv.parameter_groups(layer, 0.1)
    assert [p.shape for p in decayed["params"]] == [layer.weight.shape]
    assert any(p is layer.gates for p in kept["params"])
    assert "gates" in DGConv2d.no_decay
    target = with_gates(DGConv2d(8, 8, 3, padding=1), 0, 0, 0)
    optimizer = torch.optim.SGD([layer.gates], lr=1e-3)
    with torch.no_grad():
        layer.weight.copy_(target.weight)
        layer.bias.copy_(target.bias)
    for _ in range(20):
        x = torch.randn(4, 8, 6, 6)
        optimizer.zero_grad()
        (layer(x) - target(x)).square().mean().backward()
        optimizer.step()
    assert (layer.gates < 0).all(), "the gates found the groups that made the targets"


def test_a_plain_checkpoint_opens_the_gates():
    layer = with_gates(DGConv2d(8, 8, 3), 0, 1, 0)
    plain = nn.Conv2d(8, 8, 3)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(layer(example(layer)), plain(example(layer)))


@pytest.mark.parametrize("sort", [False, True])
def test_complexity_has_the_derivative_of_its_formula(sort):
    layer = with_gates(DGConv2d(8, 8, 3, sort=sort, complexity_weight=0.5, **F64), 1, 0, 1)
    layer.complexity().backward()
    same(layer.gates.grad, torch.full((3,), math.log(2) * 2 ** (3 + 2), **F64))
    assert foldconv.regularization(layer).item() == 0.5 * 2 ** (3 + 2)
    assert DGConv2d(8, 8, 3).regularization() is None
    assert foldconv.expand(nn.Conv2d(8, 8, 3), DGConv(complexity_weight=2.0)).regularization().item() == 128


def test_budget_objective_is_the_papers():
    net = nn.Sequential(with_gates(DGConv2d(64, 64, 1), 1, 1, 1, 0, 0, 0), with_gates(DGConv2d(16, 32, 1), 1, 1, 1, 1))
    zeta = 64 * 64 / 8 + 16 * 32
    assert complexity(net).item() == zeta
    loss = torch.tensor(3.0, requires_grad=True)
    for budget in (100.0, None, 300.0):
        o = budget or (64 * 64 + 16 * 32) / 32
        assert budget_objective(loss, net, budget).item() == pytest.approx(3.0 * (o / zeta) ** -0.02)
    assert budget_objective(loss, net, 100.0, exponent=-0.5).item() == pytest.approx(3.0 * (100 / zeta) ** -0.5)
    assert budget_objective(loss, net, 2 * zeta).item() == 3.0, "within the budget nothing is charged"
    budget_objective(loss, net, 100.0).backward()
    assert all((layer.gates.grad > 0).all() for layer in net), "closing gates lowers the objective"
    assert loss.grad.item() == pytest.approx((100 / zeta) ** -0.02)


@pytest.mark.parametrize(("budget", "exponent"), [(0, -0.02), (-1.0, -0.02), (math.inf, -0.02), (5.0, 0.1)])
def test_budgets_that_cannot_be(budget, exponent):
    message = f"expected a positive budget and an exponent of at most 0, received {budget!r} and {exponent!r}"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        budget_objective(torch.tensor(1.0), DGConv2d(4, 4, 1), budget, exponent)


def test_a_budget_needs_layers():
    with pytest.raises(UnsupportedError, match=r"^Sequential has no DGConv layer; expand it with 'dgconv' first$"):
        budget_objective(torch.tensor(1.0), nn.Sequential(nn.Conv2d(4, 4, 1)))


# ---------------------------------------------------------------------- files


def plain_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    )


@pytest.mark.parametrize("gates", [(1, 0, 1), (0, 1, 1), (1, 1, 1)], ids=["interleaved", "contiguous", "open"])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_folded_network_is_saved_and_loaded_into_the_plain_one(tmp_path, gates, batchnorm):
    rich = foldconv.expand(plain_net(), "dgconv", include="3").eval()
    with_gates(rich[3], *gates)
    x = torch.randn(2, 3, 6, 6)
    folded = foldconv.fold(rich, batchnorm=batchnorm)
    for name, model in (("folded", folded), ("absorbed", foldconv.absorb_permutations(folded))):
        foldconv.save(model, tmp_path / name)
        other = plain_net().to(memory_format=torch.channels_last)
        again = foldconv.load(tmp_path / name, foldconv.fold(other, batchnorm=True) if batchnorm else other).eval()
        torch.testing.assert_close(again(x), rich(x))
        assert [type(m) for m in again] == [type(m) for m in model]
        assert type(other[3]) is nn.Conv2d
        assert other[3].groups == 1
    foldconv.save(rich, tmp_path / "rich")
    torch.testing.assert_close(foldconv.load(tmp_path / "rich", plain_net()).eval()(x), rich(x))


def test_a_folded_convolution_alone_is_saved_and_loaded(tmp_path):
    folded = with_gates(DGConv2d(8, 8, 3), 1, 0, 1).fold()
    foldconv.save(folded, tmp_path / "one")
    again = foldconv.load(tmp_path / "one", nn.Conv2d(8, 8, 3))
    assert torch.equal(again(example(folded)), folded(example(folded)))


@pytest.mark.parametrize("plain", [nn.Conv2d(8, 12, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 5)])
def test_groups_that_do_not_fit_are_refused(tmp_path, plain):
    foldconv.save(with_gates(DGConv2d(8, 8, 3), 0, 0, 1).fold(), tmp_path / "one")
    with pytest.raises(foldconv.CheckpointError, match=r"[12] misshapen: .*weight .*received \(8, 2, 3, 3\)"):
        foldconv.load(tmp_path / "one", nn.Sequential(plain)[0])


@pytest.mark.parametrize("groups", [None, 3, [8], {"": 0}, {"": -2}, {"": "2"}, {"": True}, {"": 3}, {"other": 2}])
def test_a_damaged_list_of_groups_is_no_way_in(tmp_path, groups):
    folded = with_gates(DGConv2d(8, 8, 3), 0, 1, 1).fold()
    header = {"format": 1, "layers": {}, "shared": {}, "groups": groups}
    save_file(folded.state_dict(), tmp_path / "one", metadata={"foldconv": json.dumps(header)})
    with pytest.raises(foldconv.CheckpointError, match=r"1 misshapen: weight|header: groups: expected dict of int"):
        foldconv.load(tmp_path / "one", nn.Conv2d(8, 8, 3))


def test_the_command_line_folds_what_it_opens_again(tmp_path):
    pytest.importorskip("lightning")
    from foldconv.lab.cli import main
    from foldconv.lab.train.checkpoint import open_network
    from foldconv.lab.zoo import create

    net = foldconv.expand(create("digits_resnet"), "dgconv").eval()
    for seed, layer in enumerate(m for m in net.modules() if isinstance(m, DGConv2d)):
        with_gates(layer, *(torch.arange(len(layer.gates)) % 2 == seed % 2))
    foldconv.save(net, tmp_path / "rich", extra={"architecture": "digits_resnet", "architecture_args": {}})
    assert main(["fold", str(tmp_path / "rich"), str(tmp_path / "plain.safetensors"), "--batchnorm"]) in (0, None)
    again, _ = open_network(tmp_path / "plain.safetensors")
    assert any(isinstance(m, PermutedConv2d) for m in again.modules())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again(x), net(x), rtol=1e-4, atol=1e-4 * net(x).abs().max().item())


# ---------------------------------------------------------------------- refusals and arguments


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (
            nn.ConvTranspose2d(4, 4, 3),
            "the paper's mask is for convolutions, and ConvTranspose2d is a transposed one",
        ),
        (
            nn.Conv2d(1, 4, 3),
            "it has 1 input and 4 output channels, which two does not divide both, so there is nothing to group",
        ),
        (
            nn.Conv2d(12, 8, 3, groups=4),
            "it has 3 input and 2 output channels in each of its 4 groups, which two does not divide both, so there "
            "is nothing to group",
        ),
    ],
)
def test_convolutions_without_groups_to_learn_are_left(conv, reason):
    cls = type(conv).__name__
    with pytest.raises(NoMatchError, match=re.escape(reason)):
        foldconv.expand(nn.Sequential(conv), "dgconv")
    with pytest.raises(UnsupportedError, match=re.escape(f"0: {cls} cannot become dgconv: {reason}")):
        foldconv.expand(nn.Sequential(conv), "dgconv", include="0")
    with pytest.raises(UnsupportedError, match=f"^{re.escape(f'{cls} cannot become dgconv: {reason}')}$"):
        DGConv().expand(conv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sort": 1}, "sort: expected True or False, received 1"),
        ({"complexity_weight": -0.5}, "complexity_weight: expected a number ≥ 0, received -0.5"),
        ({"complexity_weight": "1"}, "complexity_weight: expected a number ≥ 0, received '1'"),
        ({"complexity_weight": True}, "complexity_weight: expected a number ≥ 0, received True"),
        ({"complexity_weight": math.nan}, "complexity_weight: expected a number ≥ 0, received nan"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        DGConv2d(4, 4, 3, **options)
    with pytest.raises(UnsupportedError, match=f"^0: {re.escape(message)}$"):
        foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, 3)), DGConv(**options))


@pytest.mark.parametrize(("made", "plain"), PLAIN.items(), ids=lambda c: c.__name__)
def test_arguments_are_those_of_the_plain_layer_in_its_order(made, plain):
    layer, wanted = (cls(4, 8, 3, 2, 1, 1, 2, False) for cls in (made, plain))
    assert repr(layer) == repr(wanted).replace(plain.__name__, made.__name__)
    assert layer(example(layer)).shape == wanted(example(layer)).shape
    ours = inspect.signature(made).parameters
    assert list(ours) == [*inspect.signature(plain).parameters, "sort", "complexity_weight"]
    assert ours["sort"].kind is inspect.Parameter.KEYWORD_ONLY
    shown = repr(made(2, 2, 1, sort=True, complexity_weight=1e-6))
    assert shown.endswith(", sort=True, complexity_weight=1e-06)")


def test_options_survive_the_layer():
    config = DGConv(sort=True, complexity_weight=0.25)
    assert foldconv.expand(nn.Conv2d(4, 4, 3), config).method == config
