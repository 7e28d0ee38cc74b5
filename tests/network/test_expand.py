"""`expand` replaces what was asked for, keeps everything else, and on any error nothing has happened."""

import copy
import dataclasses
import pickle

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn.utils import prune

import foldconv
from foldconv.methods.doconv import DOConv
from foldconv.network.tree import carry_over, foldable_layers, walk


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False, **options),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, **options), nn.ReLU(), nn.Conv2d(4, 4, 1, **options)),
        nn.ConvTranspose2d(4, 2, 2, stride=2, **options),
    )


def expanded_names(model):
    return list(foldable_layers(model))


def snapshot(model):
    """Everything that an error must leave as it is: module identities, tensors (identity and values), attributes."""
    modules = {name: (id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)}
    tensors = {n: (id(t), t.detach().clone(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    return modules, tensors, attributes


def assert_untouched(model, before):
    modules, tensors, attributes = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (identity, value, grad) in tensors.items():
        assert (identity, grad) == (before[1][name][0], before[1][name][2])
        torch.testing.assert_close(value, before[1][name][1], rtol=0, atol=0, equal_nan=True)
    assert {n: a.keys() for n, a in attributes.items()} == {n: a.keys() for n, a in before[2].items()}


def learn(model, x, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# ---------------------------------------------------------------------- which convolutions


@pytest.mark.parametrize("method", ["doconv", DOConv(), DOConv(depth_multiplier=12)])
def test_by_name_or_config(method):
    net = foldconv.expand(network(), method)
    assert expanded_names(net) == ["0", "1.0", "2"]
    assert net[0].method.depth_multiplier == (getattr(method, "depth_multiplier", None) or 9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["0", "1.0", "2"]),
        ({"include": "1.*"}, ["1.0"]),
        ({"include": ["0", "2"]}, ["0", "2"]),
        ({"include": ("?",)}, ["0", "2"]),
        ({"exclude": "1.*"}, ["0", "2"]),
        ({"exclude": ["0", "1.*"]}, ["2"]),
        ({"include": "*", "exclude": "[02]"}, ["1.0"]),
        ({"where": lambda name, module: isinstance(module, nn.ConvTranspose2d)}, ["2"]),
        ({"where": lambda name, module: name.startswith("1")}, ["1.0"]),
        ({"include": "?", "where": lambda name, module: module.in_channels == 3}, ["0"]),
    ],
)
def test_selection(options, expected):
    assert expanded_names(foldconv.expand(network(), "doconv", **options)) == expected


def test_where_sees_the_callers_own_modules():
    net = network()
    assert expanded_names(foldconv.expand(net, "doconv", where=lambda name, module: module is net[2])) == ["2"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_one_pattern_of_several_that_matches_nothing(option):
    net = network()
    before = snapshot(net)
    with pytest.raises(foldconv.NoMatchError, match=r"the pattern '11\.0' .*did you mean '1\.0'\?"):
        foldconv.expand(net, "doconv", **{option: ["0", "11.0"]})
    assert_untouched(net, before)


def test_in_steps():
    net = foldconv.expand(network(), "doconv", include="0")
    net = foldconv.expand(net, DOConv(depth_multiplier=18), exclude="0")  # a pattern may name what is expanded already
    assert [layer.method.depth_multiplier for layer in foldable_layers(net).values()] == [9, 18, 18]
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(net(x), network()(x))
    assert not foldable_layers(foldconv.fold(net))


def test_expanded_already():
    net = foldconv.expand(network(), "doconv")
    before = snapshot(net)
    with pytest.raises(foldconv.NoMatchError, match="0: it is foldable already"):
        foldconv.expand(net, "doconv")
    with pytest.raises(foldconv.NoMatchError, match="foldable already"):
        foldconv.expand(net, "doconv", include="0")
    assert_untouched(net, before)


def test_root():
    conv = nn.Conv2d(3, 4, 3)
    rich = foldconv.expand(conv, "doconv")
    assert isinstance(rich, foldconv.DOConv2d)
    assert type(conv) is nn.Conv2d
    same = foldconv.expand(conv, "doconv", include="*", inplace=True)
    assert same.weight is conv.weight  # a new root around the same parameters
    assert type(foldconv.fold(rich)) is nn.Conv2d


# ---------------------------------------------------------------------- sharing


def test_module_shared_by_two_parents():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(nn.Sequential(conv), nn.ReLU(), nn.Sequential(conv))
    rich = foldconv.expand(net, "doconv")
    assert isinstance(rich[0][0], foldconv.DOConv2d)
    assert rich[0][0] is rich[2][0]
    plain = foldconv.fold(rich)
    assert type(plain[0][0]) is nn.Conv2d
    assert plain[0][0] is plain[2][0]


def test_module_under_two_names():
    net = nn.ModuleDict({"a": nn.Conv2d(3, 3, 3)})
    net["b"] = net["a"]
    for include in ("a", "b"):
        rich = foldconv.expand(net, "doconv", include=include)
        assert rich["a"] is rich["b"]
        assert rich.state_dict().keys() == {f"{n}.{k}" for n in "ab" for k in ("weight", "bias", "D")}


def test_module_also_held_in_plain_attributes():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
            self.steps = [self.conv, nn.ReLU()]
            self.table = {"a": (self.conv, 1), "b": "text"}
            self.pair = (0, self.conv)
            self.__dict__["alias"] = self.conv

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    net = Held()
    rich = foldconv.expand(net, "doconv")
    assert rich.conv is rich.steps[0] is rich.table["a"][0] is rich.pair[1] is rich.alias
    assert isinstance(rich.conv, foldconv.DOConv2d)
    assert type(net.steps[0]) is type(net.table["a"][0]) is nn.Conv2d
    x = torch.randn(1, 3, 5, 5)
    learn(rich, x)
    assert rich.conv.D.abs().max() > 0
    plain = foldconv.fold(rich, inplace=True)
    assert type(plain.steps[0]) is nn.Conv2d
    assert plain.steps[0] is plain.conv is plain.table["a"][0] is plain.pair[1] is plain.alias


def tied():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=2), nn.Conv2d(3, 3, 3))
    net[2].weight = net[0].weight
    net[3].bias = net[0].bias
    return net


@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.parametrize("inplace", [False, True])
def test_tied_weights_stay_tied_through_training_and_fold(init, inplace):
    rich = foldconv.expand(tied(), DOConv(depth_multiplier=11), init=init, inplace=inplace).double()
    for name in ("weight", "D", "weight_extra"):
        assert getattr(rich[0], name) is getattr(rich[2], name)
    assert rich[0].bias is not rich[2].bias
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    learn(rich, x)
    assert rich[0].D.abs().max() > 0
    plain = foldconv.fold(rich)
    assert plain[0].weight is plain[2].weight
    assert plain[0].bias is plain[3].bias
    assert plain[0].weight is not plain[3].weight
    assert plain[0].bias is not plain[2].bias
    torch.testing.assert_close(plain(x), rich(x), rtol=1e-10, atol=1e-10)


def test_tied_weights_are_read_by_each_layer_that_has_them():
    x = torch.randn(2, 3, 9, 9)
    rich = foldconv.expand(tied(), "doconv", example_inputs=x)
    assert type(rich[0]) is type(rich[2]) is foldconv.DOConv2d
    assert rich[0].D is rich[2].D


def test_only_one_of_two_tied_layers():
    net = tied()
    before = snapshot(net)
    for include, ties in (("0", "0 shares its weight with 2"), ("2", "2 shares its weight with 0")):
        with pytest.raises(foldconv.UnsupportedError, match=f"{ties}, which would stay as it is; .*include both"):
            foldconv.expand(net, "doconv", include=include, inplace=True)
    assert_untouched(net, before)


def test_weights_that_are_tied_by_their_memory():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    net[2].weight.data = net[0].weight.data
    for include in (None, "0", "2"):
        with pytest.raises(foldconv.UnsupportedError, match=r"in the memory of another parameter, of \d"):
            foldconv.expand(net, "doconv", include=include)
    flat = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(flat, net.parameters())  # one memory, another part of it for each
    assert type(foldconv.expand(net, "doconv")[2]) is foldconv.DOConv2d


def test_weight_tied_to_something_that_is_no_convolution():
    net = nn.Sequential(nn.Conv1d(2, 2, 3))
    net.register_parameter("code", net[0].weight)
    with pytest.raises(foldconv.UnsupportedError, match="0 shares its weight with the root"):
        foldconv.expand(net, "doconv")


@pytest.mark.parametrize(
    "second",
    [nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 4, 3, groups=2, bias=True)],
    ids=["transposed", "grouped"],
)
def test_tied_layers_that_could_not_stay_tied(second):
    first = nn.Conv2d(6, 4, 3) if isinstance(second, nn.ConvTranspose2d) else nn.Conv2d(3, 4, 3)
    net = nn.ModuleList([first, second])
    second.weight = first.weight
    before = snapshot(net)
    with pytest.raises(foldconv.UnsupportedError, match="1 shares its weight with 0, but"):
        foldconv.expand(net, "doconv", inplace=True)
    assert_untouched(net, before)


# ---------------------------------------------------------------------- what survives


def test_hooks_survive_expand_and_fold():
    conv = nn.Conv2d(3, 3, 3)
    net = nn.Sequential(conv)
    seen = []

    def note(name):
        return lambda *args, **kwargs: seen.append((name, type(args[0]).__name__))

    conv.register_forward_hook(note("forward"))
    conv.register_forward_hook(note("forward with kwargs"), with_kwargs=True)
    conv.register_forward_hook(note("always"), always_call=True)
    conv.register_forward_pre_hook(note("pre"))
    conv.register_forward_pre_hook(note("pre with kwargs"), with_kwargs=True)
    conv.register_full_backward_hook(note("backward"))
    conv.register_full_backward_pre_hook(note("backward pre"))
    conv.register_state_dict_pre_hook(note("state_dict pre"))
    conv.register_state_dict_post_hook(note("state_dict post"))
    conv.register_load_state_dict_pre_hook(note("load pre"))
    conv.register_load_state_dict_post_hook(note("load post"))

    def run(model):
        seen.clear()
        model(torch.randn(1, 3, 4, 4, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(seen)

    expected = run(net)
    assert len(expected) == 11
    rich = foldconv.expand(net, "doconv")
    assert run(rich) == [(name, "DOConv2d") for name, _ in expected]
    assert run(foldconv.fold(rich)) == expected
    assert run(net) == expected


def test_hook_handles_stay_valid_in_place():
    net = nn.Sequential(nn.Conv2d(3, 3, 3))
    calls = []
    handle = net[0].register_forward_hook(lambda *args: calls.append(1))
    foldconv.expand(net, "doconv", inplace=True)
    net(torch.randn(1, 3, 4, 4))
    handle.remove()
    net(torch.randn(1, 3, 4, 4))
    assert calls == [1]


def test_checks_do_not_run_the_users_hooks():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    calls = []
    net[0].register_forward_hook(lambda *args: calls.append("forward"))
    net[0].register_forward_pre_hook(lambda *args: calls.append("pre"))
    foldconv.fold(foldconv.expand(net, "doconv"), batchnorm=True)
    assert calls == []


def test_compiled_layer_does_not_keep_running_the_old_one():
    net = nn.Sequential(nn.Conv2d(3, 3, 3))
    net[0].compile()
    rich = foldconv.expand(net, "doconv", inplace=True)
    assert rich[0]._compiled_call_impl is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype(dtype):
    rich = foldconv.expand(network(dtype=dtype), "doconv")
    assert {p.dtype for p in rich.parameters()} == {dtype}
    assert {p.dtype for p in foldconv.fold(rich).parameters()} == {dtype}


def test_device():
    rich = foldconv.expand(network(device="meta"), "doconv")
    assert expanded_names(rich) == ["0", "1.0", "2"]
    assert {p.device.type for p in rich.parameters()} == {"meta"}
    plain = foldconv.fold(rich)
    assert {p.device.type for p in plain.parameters()} == {"meta"}
    assert plain.state_dict().keys() == network().state_dict().keys()


def test_memory_format():
    net = network().to(memory_format=torch.channels_last)
    rich = foldconv.expand(net, "doconv")
    plain = foldconv.fold(rich)
    for model in (rich, plain):
        assert model[1][0].weight.is_contiguous(memory_format=torch.channels_last)
        assert not model[1][0].weight.is_contiguous()


def test_requires_grad_and_training_flag():
    net = network()
    net[0].requires_grad_(False)
    net[1][0].bias.requires_grad_(False)
    net[1].eval()
    rich = foldconv.expand(net, "doconv")
    grads = {name: p.requires_grad for name, p in rich.named_parameters()}
    assert [name for name, grad in grads.items() if not grad] == ["0.weight", "0.D", "1.0.bias"]
    assert [m.training for m in rich.modules()] == [m.training for m in net.modules()]
    plain = foldconv.fold(rich)
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in net.parameters()]
    assert [m.training for m in plain.modules()] == [m.training for m in net.modules()]
    assert rich[1][0].training is False


def test_carrying_over_takes_the_flag_and_no_tensors():
    source, target = nn.Conv2d(3, 3, 3).eval(), nn.Conv2d(3, 3, 3)
    weight = target.weight
    assert carry_over(source, target) is target
    assert target.weight is weight
    assert not target.training


def test_attributes_of_the_users():
    net = nn.Sequential(nn.Conv2d(3, 3, 3))
    net[0].tag = {"stage": 3}
    rich = foldconv.expand(net, "doconv")
    assert rich[0].tag == {"stage": 3}
    plain = foldconv.fold(rich)
    assert plain[0].tag == {"stage": 3}
    assert vars(plain[0]).keys() == vars(net[0]).keys()


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("make", [foldconv.DOConv2d, foldconv.ExpandNetConv2d, foldconv.OREPAConv2d])
def test_attributes_of_the_users_on_a_layer_that_a_constructor_made(make, remake):
    net = nn.Sequential(remake(make(3, 3, 3)))
    net[0].tag = {"stage": 3}
    plain = foldconv.fold(remake(net))[0]
    assert plain.tag == {"stage": 3}
    assert vars(plain).keys() == {*vars(nn.Conv2d(3, 3, 3)), "tag"}


@dataclasses.dataclass(frozen=True)
class Noting(DOConv):
    """A method that hangs something on its layers once they are built."""

    def expand(self, conv, init="preserve", norm=None):
        layer = super().expand(conv, init)
        layer.made_from = repr(conv)
        return layer


def test_attributes_that_a_method_attaches_are_its_own():
    net = nn.Sequential(nn.Conv2d(3, 3, 3))
    net[0].tag = 1
    rich = foldconv.expand(net, Noting())
    assert rich[0].made_from == repr(net[0])
    assert vars(foldconv.fold(rich)[0]).keys() == vars(net[0]).keys()


# ---------------------------------------------------------------------- in place or not, and errors


def test_in_place_keeps_parameters_so_that_an_optimizer_stays_valid():
    net = network()
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    root = foldconv.expand(net, "doconv", inplace=True)
    assert root is net
    now = dict(net.named_parameters())
    assert all(now[name] is p for name, p in parameters.items())
    before = copy.deepcopy(net.state_dict())
    net(torch.randn(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == parameters.keys()


@pytest.mark.parametrize("init", ["preserve", "paper"])
def test_a_copy_leaves_the_model_alone(init):
    net = network()
    before = snapshot(net)
    rich = foldconv.expand(net, "doconv", init=init)
    assert_untouched(net, before)
    learn(rich, torch.randn(1, 3, 8, 8))
    assert_untouched(net, before)
    foldconv.fold(rich)
    assert_untouched(net, before)


@dataclasses.dataclass(frozen=True)
class Failing(DOConv):
    """A method that fails at the second layer."""

    error: type = RuntimeError

    def expand(self, conv, init="preserve", norm=None):
        if conv.groups == 2:
            raise self.error("no")
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(DOConv)}
        return DOConv(**options).expand(conv, init)


@pytest.mark.parametrize("error", [RuntimeError, foldconv.UnsupportedError, KeyboardInterrupt])
@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_error_halfway_changes_nothing(error, init, inplace):
    net = network()
    net[0].register_load_state_dict_pre_hook(lambda *args: None)
    before = snapshot(net)
    with pytest.raises(error, match="no"):
        foldconv.expand(net, Failing(error=error), init=init, inplace=inplace)
    assert_untouched(net, before)
    net.load_state_dict(net.state_dict())  # its hook still knows its module


def test_an_error_in_where_changes_nothing():
    net = network()
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError):
        foldconv.expand(net, "doconv", where=lambda name, module: 1 / 0, inplace=True)
    assert_untouched(net, before)


# ---------------------------------------------------------------------- unsupported modules


def pruned():
    conv = nn.Conv2d(3, 3, 3)
    prune.random_unstructured(conv, "weight", 0.5)
    return conv


def standardized():
    return timm.layers.StdConv2d(3, 3, 3)


def patched():
    conv = nn.Conv2d(3, 3, 3)
    conv.forward = lambda x: x
    return conv


def integer():
    conv = nn.Conv2d(3, 3, 3)
    conv.weight = nn.Parameter(conv.weight.to(torch.int8), requires_grad=False)
    return conv


def with_a_buffer():
    conv = nn.Conv2d(3, 3, 3)
    conv.register_buffer("scale", torch.ones(3))
    return conv


UNSUPPORTED = {
    "StdConv2d standardizes its weight at each call": standardized,
    "Conv2dSame with a stride pads by the size of its input": lambda: timm.layers.Conv2dSame(3, 3, 3, stride=2),
    "Odd is a subclass with its own _conv_forward, so": lambda: type("Odd", (nn.Conv2d,), {"_conv_forward": 0})(
        3, 3, 3
    ),
    "it is lazy and has no weight yet": lambda: nn.LazyConv2d(3, 3),
    "weight is computed from something else": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
    r"computed from something else \(weight_norm": lambda: nn.utils.weight_norm(nn.Conv2d(3, 3, 3)),
    "computed from something else .*pruning": pruned,
    "weight is torch.complex64; expected a floating": lambda: nn.Conv2d(3, 3, 3, dtype=torch.complex64),
    "weight is torch.int8; expected a floating": integer,
    "forward was replaced on the instance": patched,
    "also holds 'scale'": with_a_buffer,
    "one tap": lambda: nn.Conv2d(3, 3, 1),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("reason", UNSUPPORTED)
@pytest.mark.parametrize("inplace", [False, True])
def test_unsupported(reason, inplace):
    odd = UNSUPPORTED[reason]()
    net = nn.Sequential(nn.Conv2d(3, 3, 3), odd)
    # Alone it is refused with the reason, by name it is refused, by pattern it is skipped.
    with pytest.raises(foldconv.NoMatchError, match=reason):
        foldconv.expand(nn.Sequential(odd), "doconv", inplace=inplace)
    with pytest.raises(foldconv.UnsupportedError, match=f"^1: .* cannot become doconv: .*{reason}"):
        foldconv.expand(net, "doconv", include=["0", "1"], inplace=inplace)
    assert net[1] is odd
    for options in ({}, {"include": "*"}, {"include": ["0", "?"]}):
        rich = foldconv.expand(copy.copy(net), "doconv", **options)
        assert expanded_names(rich) == ["0"]
        assert type(rich[1]) is type(odd)


class Autoencoder(nn.Module):
    """Decodes with the encoder's own weight."""

    def __init__(self):
        super().__init__()
        self.encoder, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x):
        about = self.other.weight.size(0) * self.other.weight.shape[0] * next(self.other.parameters()).dim()
        y = self.encoder(self.other(x).to(self.other.weight.dtype) * about)
        return nn.functional.conv_transpose2d(y, self.encoder.weight)


def test_weight_that_the_model_reads():
    reason = "encoder: .*also reads its weight"
    assert expanded_names(foldconv.expand(Autoencoder(), "doconv")) == ["other"]
    with pytest.raises(foldconv.UnsupportedError, match=reason):
        foldconv.expand(Autoencoder(), "doconv", include="encoder")
    with pytest.raises(foldconv.NoMatchError, match=reason):
        foldconv.expand(Autoencoder(), "doconv", include="enc*")


# ---------------------------------------------------------------------- what the result computes


@pytest.mark.parametrize("multiplier", [None, 25])
def test_preserve_keeps_the_function_and_paper_draws_anew(multiplier):
    net = network(dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    config = DOConv(depth_multiplier=multiplier)
    torch.testing.assert_close(foldconv.expand(net, config)(x), net(x), rtol=1e-12, atol=1e-12)
    drawn = foldconv.expand(net, config, init="paper")
    assert not torch.equal(drawn[0].weight, net[0].weight)
    assert torch.equal(drawn[1][2].weight, net[1][2].weight)  # what is not replaced keeps its values
    assert (drawn(x) - net(x)).abs().max() > 1e-3
    torch.testing.assert_close(foldconv.fold(drawn)(x), drawn(x), rtol=1e-10, atol=1e-10)


def test_walk_yields_every_name():
    conv = nn.Conv2d(1, 1, 3)
    net = nn.Sequential(conv, nn.Sequential(conv))
    assert [name for name, _ in walk(net)] == ["", "0", "1", "1.0"]
    assert list(foldable_layers(foldconv.expand(net, "doconv"))) == ["0"]
