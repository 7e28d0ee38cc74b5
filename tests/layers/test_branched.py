"""Branches in evaluation mode: one convolution, composed once, never stale; and where the branches run all the same."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook

import foldconv
from foldconv import UnsupportedError
from foldconv.algebra import Scale, Sum, kernel_rule
from foldconv.layers import BranchedConv
from foldconv.testing import randomize

METHODS = ["repvgg", "acnet", "mobileone", "qarepvgg", "dbb", "orepa_vgg"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
IN_FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def network(method="repvgg", dtype=torch.float64, **conv):
    torch.manual_seed(0)
    arguments = {"kernel_size": 3, "padding": 1, "bias": False, **conv}
    net = foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, **arguments), nn.BatchNorm2d(4)), method).double().eval()
    randomize(net)
    return net.to(dtype)


def layer(method="repvgg", dtype=torch.float64, **conv):
    """A layer in evaluation mode whose branches and statistics are random."""
    return network(method, dtype, **conv)[0]


def block():
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6))
    made = foldconv.FoldableBlock(Sum(branch, nn.Conv2d(4, 6, 1, stride=2))).double().eval()
    randomize(made)
    return made


def image(dtype=torch.float64):
    return torch.randn(2, 4, 9, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Counts:
    """How often the body ran, and how often its kernel was composed."""

    def __init__(self):
        self.bodies = self.kernels = 0

    def __iter__(self):
        return iter((self.bodies, self.kernels))


@pytest.fixture
def counts(monkeypatch):
    found = Counts()
    original = Sum.forward  # there is one in all bodies here

    def run(self, input):
        found.bodies += 1
        return original(self, input)

    monkeypatch.setattr(Sum, "forward", run)
    for cls in (BranchedConv, foldconv.FoldableBlock):

        def compose(self, dtype=torch.float64, original=cls.to_kernel):
            found.kernels += 1
            return original(self, dtype)

        monkeypatch.setattr(cls, "to_kernel", compose)
    return found


def take(counts):
    found = tuple(counts)
    counts.bodies = counts.kernels = 0
    return found


# ---------------------------------------------------------------------- one convolution


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [*(lambda m=m: layer(m) for m in METHODS), block], ids=[*METHODS, "block"])
def test_one_convolution_composed_once(make, context, counts):
    made, x = make(), image()
    take(counts)
    with context():
        outputs = [made(x) for _ in range(3)]
        assert take(counts) == (0, 1)
        for y in outputs:
            torch.testing.assert_close(y, made.feature_forward(x), **CLOSE)


@pytest.mark.parametrize(
    "conv", [{"stride": 2}, {"padding": "same"}, {"padding": 0}, {"padding_mode": "reflect"}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_geometries(method, conv, counts):
    made, x = layer(method, **conv), image()
    with torch.no_grad():
        y = made(x)
        assert take(counts) == (0, 1)
        torch.testing.assert_close(y, made.feature_forward(x), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_float32_to_its_rounding(method):
    made, x = layer(method, torch.float32), image(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(made(x), made.feature_forward(x), **IN_FLOAT32)


def test_the_kernel_is_composed_in_float32_at_least(monkeypatch):
    types, original = [], BranchedConv.to_kernel
    monkeypatch.setattr(BranchedConv, "to_kernel", lambda self, dtype: types.append(dtype) or original(self, dtype))
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            assert layer(dtype=dtype)(image(dtype)).dtype == dtype
    assert types == [torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method, counts):
    made, x = layer(method, torch.float32), image(torch.float32)
    take(counts)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(x).dtype == torch.bfloat16
        y = made(x)
        assert take(counts) == (0, 1)
        torch.testing.assert_close(y, made.feature_forward(x), **IN_FLOAT32)


def test_a_body_in_half_precision_with_norms_in_single(counts):
    made = layer(dtype=torch.bfloat16)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    with torch.no_grad():
        assert made(image(torch.bfloat16)).dtype == torch.bfloat16
    assert take(counts) == (0, 1)


def test_channels_last(counts):
    made = layer().to(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = made(x)
        assert take(counts) == (0, 1)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert made._kept.plain.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, made.feature_forward(x), **CLOSE)


def test_the_whole_network(counts):
    net, x = network("dbb"), image()
    with torch.no_grad():
        expected = net[0].feature_forward(x)
        take(counts)
        torch.testing.assert_close(net(x), expected, **CLOSE)
        net(x)
    assert take(counts) == (0, 1)


def test_a_frozen_layer_lets_the_input_gradient_through(counts):
    made, x = layer(), image().requires_grad_()
    with torch.inference_mode():
        made(x)
    made.requires_grad_(False)
    y = made(x)
    assert take(counts) == (0, 1)
    assert not made._kept.plain.weight.requires_grad
    (received,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(made.feature_forward(x).square().sum(), x)
    torch.testing.assert_close(received, expected, **CLOSE)


def test_the_kernel_is_composed_where_the_parameters_are():
    assert layer("dbb").to("meta").to_kernel().weight.is_meta
    assert foldconv.FoldableBlock(Sum(nn.Conv2d(4, 4, 1), nn.Identity())).to("meta").to_kernel().weight.is_meta


# ---------------------------------------------------------------------- never stale


def conv(made):
    return made.body.main.conv


def norm(made):
    return made.body.point.norm


def in_place(find):
    @torch.no_grad()
    def change(made):
        find(made).add_(0.1)

    return change


def silent(then):
    """An edit that no version counter sees, followed by what makes the layer look again."""

    def change(made):
        conv(made).weight.data.add_(0.1)
        then(made)

    return change


def another_norm(made):
    other = copy.deepcopy(norm(made))
    other.bias.data.add_(1.0)
    made.body.point.norm = other


def another_branch(made):
    made.body.add_module("extra", nn.Conv2d(4, 4, 1, bias=False).double().eval())


def a_wider_branch(made):
    made.body.add_module("extra", nn.Conv2d(4, 4, 5, padding=2, bias=False).double().eval())


def another_body(made):
    made.body = copy.deepcopy(made.body)
    conv(made).weight.data.mul_(2)


def a_norm_sees_a_batch(made):
    norm(made).train()(image() + 1)
    norm(made).eval()


def new_storage(made):
    norm(made).weight.data = norm(made).weight.data + 0.1


def load(made, **options):
    made.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in made.state_dict().items()}, **options)


def train_step(made):
    made.train()(image() + 1)
    made.eval()


CHANGES = {
    "weight": in_place(lambda made: conv(made).weight),
    "norm weight": in_place(lambda made: norm(made).weight),
    "running_mean": in_place(lambda made: norm(made).running_mean),
    "running_var": in_place(lambda made: norm(made).running_var),
    "eps": lambda made: setattr(norm(made), "eps", 0.5),
    "new_storage": new_storage,
    "new_parameter": lambda made: setattr(conv(made), "weight", nn.Parameter(conv(made).weight.detach() + 0.1)),
    "new_buffer": lambda made: setattr(norm(made), "running_mean", norm(made).running_mean + 0.1),
    "another_norm": another_norm,
    "another_branch": another_branch,
    "a_wider_branch": a_wider_branch,
    "another_body": another_body,
    "a_norm_sees_a_batch": a_norm_sees_a_batch,
    "train_step": train_step,
    "load_state_dict": load,
    "load_state_dict_assign": lambda made: load(made, assign=True),
    "data_then_eval": silent(lambda made: made.eval()),
    "data_then_training": silent(lambda made: (setattr(made, "training", True), setattr(made, "training", False))),
    "data_then_to": silent(lambda made: made.to("cpu")),
    "data_then_load": silent(lambda made: made.load_state_dict({}, strict=False)),
    "data_then_forget": silent(lambda made: made.forget()),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change, context, counts):
    made, x = layer(), image()
    with context():
        before = made(x)
    with torch.no_grad():
        change(made)
    take(counts)
    with context():
        after = made(x)
        made(x)
        assert take(counts) == (0, 1)
        torch.testing.assert_close(after, made.feature_forward(x), **CLOSE)
    assert (after - before).abs().max() > 1e-3


def test_a_change_in_inference_mode_is_seen():
    made, x = layer(), image()
    with torch.inference_mode():
        made(x)
        norm(made).running_mean.add_(0.1)
        torch.testing.assert_close(made(x), made.feature_forward(x), **CLOSE)


def test_a_step_of_the_optimizer_is_seen():
    made, x = layer(), image()
    with torch.no_grad():
        before = made(x)
    made(x).square().sum().backward()
    torch.optim.SGD(made.parameters(), lr=0.01).step()
    with torch.no_grad():
        torch.testing.assert_close(made(x), made.feature_forward(x), **CLOSE)
        assert (made(x) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        copy.copy,
        lambda made: pickle.loads(pickle.dumps(made)),
        lambda made: (torch.save(made, file := io.BytesIO()), file.seek(0), torch.load(file, weights_only=False))[2],
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_carry_nothing(duplicate):
    made, x = layer(), image()
    with torch.no_grad():
        before = made(x)
        assert "_kept" in vars(made)
        twin = duplicate(made)
        assert "_kept" not in vars(twin)
        torch.testing.assert_close(twin(x), before, **CLOSE)


def test_nothing_is_registered():
    made = layer()
    members = (made.named_modules, made.named_parameters, made.named_buffers)
    before = [[name for name, _ in found()] for found in members]
    keys = list(made.state_dict())
    with torch.no_grad():
        made(image())
    after = [[name for name, _ in found()] for found in members]
    assert (after, list(made.state_dict())) == (before, keys)


# ---------------------------------------------------------------------- the branches run


def test_where_gradients_are_wanted(counts):
    made, x = layer("dbb"), image().requires_grad_()
    with torch.no_grad():
        made(x)  # so that there is something kept
    take(counts)
    received = torch.autograd.grad(made(x).pow(3).sum(), [x, *made.parameters()])
    assert counts.kernels == 0
    expected = torch.autograd.grad(made.feature_forward(x).pow(3).sum(), [x, *made.parameters()])
    for a, b in zip(received, expected):
        torch.testing.assert_close(a, b, **CLOSE)


def hook(*_):
    return None


WATCHED = {
    "forward hook": lambda made: norm(made).register_forward_hook(hook),
    "forward pre-hook": lambda made: norm(made).register_forward_pre_hook(hook),
    "backward hook": lambda made: norm(made).register_full_backward_hook(hook),
    "backward pre-hook": lambda made: norm(made).register_full_backward_pre_hook(hook),
    "hook on all modules": lambda made: register_module_forward_hook(hook),
}


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_where_somebody_looks_at_a_branch(watch, counts):
    made, x = layer(), image()
    with torch.no_grad():
        made(x)
        take(counts)
        handle = watch(made)
        made(x)
        assert counts.bodies
        handle.remove()
        take(counts)
        made(x)
        assert not counts.bodies


def test_a_hook_on_the_layer_itself_is_no_reason(counts):
    made, seen = layer(), []
    made.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        made(image())
    assert (seen, take(counts)) == ([1], (0, 1))


def training_norm(made):
    norm(made).train()


def other_forward(made):
    norm(made).forward = lambda input: input * 3


def parametrized(made):
    nn.utils.parametrizations.weight_norm(conv(made)).eval()


def replica(made):
    # As nn.DataParallel makes them: parameters are attributes.
    weight = norm(made).weight.detach() * 2
    del norm(made)._parameters["weight"]
    norm(made).__dict__["weight"] = weight


def no_parameter(made):
    conv(made)._parameters["weight"] = conv(made).weight.detach() * 2


def two_types(made):
    made.body.add_module("extra", Scale(4).float().eval())


@kernel_rule(nn.Softshrink)
def no_rule(module, channels, ndim):
    raise UnsupportedError("not linear")


def not_linear(made):
    made.body.add_module("extra", nn.Softshrink().eval())


STRANGE = [training_norm, other_forward, parametrized, replica, no_parameter, two_types, not_linear]


@pytest.mark.parametrize("change", STRANGE)
def test_where_the_body_is_not_what_a_kernel_describes(change, counts):
    made, x = layer(), image()
    with torch.no_grad():
        made(x)
        change(made)
        twin = copy.deepcopy(made)
        take(counts)
        y = made(x)
        assert counts.bodies
        take(counts)
        made(x)
        assert (bool(counts.bodies), counts.kernels) == (True, 0), "refused once, not at each forward"
        torch.testing.assert_close(y, twin.body(x), **CLOSE)


def test_replicas_do_not_use_the_originals_kernel():
    made, x = layer(), image()
    with torch.no_grad():
        made(x)
        twin = made._replicate_for_data_parallel()
        assert twin._kept is made._kept
        twin._modules["body"] = copy.deepcopy(made.body)
        conv(twin).weight.mul_(2)
        torch.testing.assert_close(twin(x), twin.body(x), **CLOSE)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        made, x = layer(), image()
        before = made(x)
        conv(made).weight.mul_(1.5)
        torch.testing.assert_close(made(x), made.feature_forward(x), **CLOSE)
        assert (made(x) - before).abs().max() > 1e-2


def test_functional_calls():
    made, x = layer(), image()
    with torch.no_grad():
        before = made(x)
        other = {name: p * 1.1 for name, p in made.named_parameters()}
        received = torch.func.functional_call(made, other, (x,))
        assert (received - before).abs().max() > 1e-2
        torch.testing.assert_close(made(x), before, **CLOSE)
        batched = torch.func.vmap(made)(x[None])
        torch.testing.assert_close(batched[0], before, **CLOSE)


def test_in_training_mode(counts):
    made = layer().train()
    with torch.no_grad():
        made(image())
    assert (bool(counts.bodies), counts.kernels) == (True, 0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit.trace is deprecated, and still used
def test_tracers_see_the_branches(counts):
    made, x = layer(), image()
    with torch.no_grad():
        expected = made(x)
        traced = torch.jit.trace(made, x)
        assert str(traced.inlined_graph).count("aten::batch_norm") == 3
        torch.testing.assert_close(traced(x), expected, **CLOSE)
        graph = fx.symbolic_trace(made)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in graph.modules()) == 3
        torch.testing.assert_close(graph(x), expected, **CLOSE)


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad])
def test_compilers_see_the_branches(context):
    made, x = layer(), image()
    ops = []

    def backend(graph, _):
        ops.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with context():
        expected = made(x)
        compiled = torch.compile(made, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), expected, **CLOSE)
        assert sum("batch_norm" in str(op) for op in ops) == 3
        with torch.no_grad():
            norm(made).running_mean.add_(1.0)
        torch.testing.assert_close(compiled(x), made.feature_forward(x), **CLOSE)
    torch.compiler.reset()


def test_stand_ins_are_not_kept():
    made, x = layer(), image()
    with torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            assert made(mode.from_tensor(x)).shape == (2, 4, 9, 8)
        torch.testing.assert_close(made(x), made.feature_forward(x), **CLOSE)
        assert type(made._kept.plain.weight) is nn.Parameter
