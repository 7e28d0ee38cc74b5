"""The composed kernel: composed at every forward, so never stale, and what a checkpoint or a copy holds."""

import contextlib
import copy
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import foldconv
from foldconv import DOConv2d
from foldconv.layers import ComposedConv

NAMES = ("weight", "bias", "D", "weight_extra")
F64 = {"dtype": torch.float64}


@pytest.fixture
def compositions(monkeypatch):
    """A list that grows by one entry, the dtypes composed from, with every composition."""
    calls = []
    original = DOConv2d.compose

    def counted(self, *parameters):
        calls.append([p.dtype for p in parameters if p is not None])
        return original(self, *parameters)

    monkeypatch.setattr(DOConv2d, "compose", counted)
    return calls


def layer(**options):
    """A DO-Conv in evaluation mode that is far from the plain convolution, in float64."""
    torch.manual_seed(0)
    made = DOConv2d(4, 6, 3, padding=1, depth_multiplier=12, **F64, **options)
    nn.init.normal_(made.D, std=0.5)
    return made.eval()


def batch():
    return torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1), **F64)


def expected(made, x):
    """What the layer has to give for its present parameters, by the paper's definition (groups = 1)."""
    taps = torch.cat([made.weight.flatten(2), made.weight_extra], 2)
    identity = torch.eye(9, 12, dtype=made.D.dtype)
    kernel = torch.einsum("ims,ois->oim", identity + made.D, taps).reshape(made.weight.shape)
    return F.conv2d(x, kernel, made.bias, padding=1)


def assert_same(received, wanted, tolerance=1e-10):
    torch.testing.assert_close(received, wanted, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- composed at every forward


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_every_forward_composes(compositions, context, training):
    made, x = layer().train(training), batch()
    with context():
        for _ in range(3):
            assert_same(made(x), expected(made, x))
    assert len(compositions) == 3


# ---------------------------------------------------------------------- never stale


def optimizer_step(made):
    for p in made.parameters():
        p.grad = torch.full_like(p, 0.1)
    torch.optim.SGD(made.parameters(), lr=1.0).step()


def adam_step(made):
    for p in made.parameters():
        p.grad = torch.full_like(p, 0.1)
    torch.optim.AdamW(made.parameters(), lr=0.1, foreach=True).step()


def load(made, **options):
    made.load_state_dict({k: v + 0.1 for k, v in made.state_dict().items()}, **options)


def edit(name):
    def in_place(made):
        with torch.no_grad():
            getattr(made, name).add_(0.1)

    return in_place


def new_storage(made):
    made.D.data = made.D.data + 0.1


def new_parameter(made):
    made.D = nn.Parameter(made.D.detach() + 0.1)


def behind_the_back(made):
    # The way torch's own utilities swap parameters, past __setattr__.
    made._parameters["D"] = nn.Parameter(made.D.detach() + 0.1)


CHANGES = {
    "sgd": optimizer_step,
    "adamw_foreach": adam_step,
    "weight": edit("weight"),
    "D": edit("D"),
    "weight_extra": edit("weight_extra"),
    "new_storage": new_storage,
    "new_parameter": new_parameter,
    "behind_the_back": behind_the_back,
    "load_state_dict": load,
    "load_state_dict_assign": lambda made: load(made, assign=True),
    "detached_alias": lambda made: made.D.detach().add_(0.1),
    "data": lambda made: made.D.data.add_(0.1),
}


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_parameter_is_seen(change, context):
    made, x = layer(), batch()
    with context():
        before = made(x)
        assert_same(made(x), before)
        change(made)
        after = made(x)
        assert_same(after, expected(made, x))
        assert_same(after, foldconv.fold(made)(x))
    assert (after - before).abs().max() > 1e-3


def test_another_parameter_of_the_same_version_and_address_is_seen():
    torch.manual_seed(0)
    made, x = DOConv2d(4, 6, 3, **F64).eval(), batch()
    nn.init.normal_(made.D)
    before = made(x)
    turned = nn.Parameter(made.D.detach().transpose(1, 2))
    with torch.no_grad():
        while turned._version < made.D._version:
            turned.mul_(1.0)
    assert (turned._version, turned.data_ptr()) == (made.D._version, made.D.data_ptr())
    made._parameters["D"] = turned
    assert (made(x) - before).abs().max() > 0.1


def test_tensors_of_a_functional_call_are_not_held():
    made, x = layer(), batch()
    other = {name: p.detach() * 1.1 for name, p in made.named_parameters()}
    with torch.no_grad():
        torch.func.functional_call(made, other, (x,))
    alive = weakref.ref(other.pop("D"))
    assert alive() is None


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        made, x = layer(), batch()
        before = made(x)
        made.D.mul_(1.5)
        assert (made(x) - before).abs().max() > 0.1
        assert_same(made(x), expected(made, x))


def test_fake_tensors():
    with FakeTensorMode():
        made = layer()
        for _ in range(2):
            assert made(torch.empty(2, 4, 7, 7, **F64)).shape == (2, 6, 7, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_changed_dtype_is_seen(dtype):
    made = layer()
    before = made.kernel()
    made.to(dtype)
    assert made.kernel().dtype == dtype
    assert_same(made.kernel().double(), before, tolerance={torch.float32: 1e-6}.get(dtype, 0.05))


def test_a_caller_may_write_to_the_kernel_it_got():
    made, x = layer(), batch()
    with torch.no_grad():
        made.kernel().zero_()
        assert_same(made(x), expected(made, x))
    made.kernel().detach().zero_()
    assert_same(made(x), expected(made, x))


# ---------------------------------------------------------------------- gradients in evaluation mode


def gradients(made, x, order):
    made.zero_grad()
    x = x.clone().requires_grad_()
    leaves = [x, *(p for p in made.parameters() if p.requires_grad)]
    found = torch.autograd.grad(made(x).pow(3).sum(), leaves, create_graph=order > 1)
    if order > 1:
        found = torch.autograd.grad(sum(g.pow(2).sum() for g in found), leaves)
    return found


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("D",), ("weight", "weight_extra"), ("D", "bias"), NAMES])
def test_gradients_in_evaluation_mode_are_those_of_training(frozen, order):
    made, x = layer(), batch()
    for name in frozen:
        getattr(made, name).requires_grad_(False)
    received = gradients(made, x, order)
    wanted = gradients(made.train(), x, order)
    assert len(received) == 5 - len(frozen)
    for got, want in zip(received, wanted):
        assert want.abs().max() > 0
        assert_same(got, want)


def test_one_gradient_alone():
    made, x = layer(), batch()
    (got,) = torch.autograd.grad(made(x).square().sum(), made.D)
    (want,) = torch.autograd.grad(expected(made, x).square().sum(), made.D)
    assert_same(got, want)


def test_two_forwards_before_one_backward():
    made, x = layer(), batch()
    (made(x).square().sum() + made(2 * x).sum()).backward()
    wanted = torch.autograd.grad(expected(made, x).square().sum() + expected(made, 2 * x).sum(), made.D)
    assert_same(made.D.grad, wanted[0])


def test_a_parameter_changed_between_forward_and_backward_is_refused_as_by_torch():
    made, x = layer(), batch()
    y = made(x)
    with torch.no_grad():
        made.D.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------------- copies and checkpoints


def through_pickle(made):
    return pickle.loads(pickle.dumps(made))


def through_torch_save(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, through_pickle, through_torch_save])
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad])
def test_copies_stand_alone(duplicate, context):
    made, x = layer(), batch()
    with context():
        before = made(x)
        twin = duplicate(made)
        assert type(twin) is DOConv2d
        assert_same(twin(x), before)
    if duplicate is not copy.copy:  # which shares the parameters, as with any module
        with torch.no_grad():
            twin.D.add_(1.0)
            assert_same(twin(x), expected(twin, x))
            assert_same(made(x), before)


def test_state_dict_round_trip():
    made, x = layer(), batch()
    state = made.state_dict()
    assert set(state) == set(NAMES)
    assert {name for name, _ in made.named_parameters()} == set(NAMES)
    assert not list(made.named_buffers())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = DOConv2d(4, 6, 3, padding=1, depth_multiplier=12, **F64).eval()
    other(x)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), made(x))


def test_the_smallest_layer_has_the_smallest_state_dict():
    assert set(DOConv2d(4, 6, 3).state_dict()) == {"weight", "bias", "D"}
    assert set(DOConv2d(4, 6, 3, bias=False).state_dict()) == {"weight", "D"}
    assert set(DOConv2d(4, 6, 1, bias=False).state_dict()) == {"weight"}


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_dict_gives_the_plain_function_whatever_was_learned_before(assign):
    made, x = layer(), batch()
    plain = nn.Conv2d(4, 6, 3, padding=1, **F64)
    made(x)
    report = made.load_state_dict(plain.state_dict(), strict=False, assign=assign)
    assert set(report.missing_keys) == {"D", "weight_extra"}
    assert not report.unexpected_keys
    assert_same(made(x), plain(x))
    with pytest.raises(RuntimeError, match="D"):
        made.load_state_dict(plain.state_dict())


def test_a_state_dict_with_part_of_the_extras_leaves_the_others():
    made, x = layer(), batch()
    wanted = made(x)
    state = {k: v for k, v in made.state_dict().items() if k != "weight_extra"}
    assert made.load_state_dict(state, strict=False).missing_keys == ["weight_extra"]
    made.load_state_dict({"bias": made.bias.detach().clone()}, strict=False)
    assert_same(made(x), wanted)


def test_a_plain_checkpoint_loads_into_the_whole_expanded_network():
    torch.manual_seed(0)
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 2, 2)
    ).double()
    plain, other = make(), make()
    for _ in range(3):
        plain(torch.randn(4, 3, 8, 8, **F64))
    net = foldconv.expand(other, "doconv", init="paper").eval()
    x = torch.randn(2, 3, 8, 8, **F64)
    assert (net(x) - plain.eval()(x)).abs().max() > 1e-3
    assert set(net.load_state_dict(plain.state_dict(), strict=False).missing_keys) == {"0.D", "4.D"}
    assert_same(net(x), plain(x))


# ---------------------------------------------------------------------- what a method has to say


def test_a_method_is_only_how_the_kernel_is_composed():
    class Standardized(ComposedConv, nn.Conv2d):
        composed_from = ("weight", "gain")

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gain = nn.Parameter(torch.empty(self.out_channels, 1, 1, 1, dtype=self.weight.dtype))
            self.reset_extra_parameters()

        def reset_extra_parameters(self):
            nn.init.ones_(self.gain)

        def compose(self, weight, gain):
            return gain * weight

    conv = nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", **F64)
    made, x = Standardized.from_conv(conv), batch()
    assert made.weight is conv.weight
    assert made.bias is conv.bias
    assert_same(made(x), conv(x))
    with torch.no_grad():
        made.gain.mul_(3.0)
    assert_same(made.eval()(x), F.conv2d(F.pad(x, [1] * 4, "circular"), 3 * conv.weight, conv.bias))
    folded = made.fold()
    assert type(folded) is nn.Conv2d
    assert folded.padding == "same"
    assert_same(folded(x), made(x))


# ---------------------------------------------------------------------- starting from a kernel


def test_start_from_makes_the_layer_that_convolution():
    made, x = layer(), batch()
    kernel = torch.randn_like(made.weight)
    weight = made.weight
    made(x)
    made.start_from(kernel)
    assert made.weight is weight
    assert_same(made(x), F.conv2d(x, kernel, made.bias, padding=1))
    assert made.D.abs().max() == 0


def test_from_conv_with_paper_values_draws_anew():
    conv = nn.Conv2d(4, 6, 3, **F64)
    before = conv.weight.detach().clone()
    made = DOConv2d.from_conv(conv, "paper")
    assert made.weight is conv.weight
    assert not torch.equal(made.weight, before)
