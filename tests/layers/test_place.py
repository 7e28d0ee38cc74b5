"""A branched layer and the norm's old place: outsiders reach the convolution and its norm, or are told why not."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import foldconv
from foldconv.testing import randomize

BRANCHED = ("repvgg", "acnet", "dbb", "mobileone", "qarepvgg", "orepa_vgg", foldconv.Dilated(depthwise_only=False))
COMPOSED = ("doconv", "dgconv", "orepa", "expandnet", foldconv.DOConv(depth_multiplier=130))
X = torch.randn(3, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pair(norm=True, size=5, ndim=2, channels=4, **options):
    conv = getattr(nn, f"Conv{ndim}d")(4, channels, size, padding=size // 2, bias=not norm, **options)
    return nn.Sequential(conv, *([getattr(nn, f"BatchNorm{ndim}d")(channels)] if norm else [])).double()


def expanded(method, **options):
    net = foldconv.expand(pair(**options), method)
    randomize(net)
    return net


def off(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------------- plain checkpoints


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("method", BRANCHED, ids=str)
def test_plain_checkpoints_load(method, strict):
    shapes = [{}, {"groups": 4}, {"norm": False}, {"channels": 8, "stride": 2}, {"ndim": 3, "groups": 2}, {"ndim": 1}]
    for shape in shapes:
        plain = pair(**shape)
        randomize(plain)
        x = X if shape.get("ndim", 2) == 2 else torch.randn(2, 4, *(6,) * shape["ndim"]).double()
        try:
            rich = expanded(method, **shape)
        except foldconv.NoMatchError:
            continue
        for target, prefix in ((rich, ""), (nn.ModuleDict({"a": rich}), "a.")):
            randomize(target)
            for assign in (False, True):
                state = {prefix + k: v.clone() for k, v in plain.state_dict().items()}
                before = {k: v.clone() for k, v in state.items()}
                result = target.load_state_dict(state, strict=strict, assign=assign)
                assert not result.missing_keys
                assert not result.unexpected_keys
                assert off(rich.eval()(x), plain.eval()(x)) < 1e-9, shape
                assert all(torch.equal(v, before[k]) for k, v in state.items())
                assert all(p.requires_grad for p in rich.parameters())
        own = {k: v.clone() for k, v in rich.state_dict().items()}
        randomize(rich)
        rich.load_state_dict(own)
        assert off(rich(x), plain(x)) < 1e-9


def test_a_plain_checkpoint_that_does_not_fit_is_refused():
    rich = expanded("repvgg")
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        rich.load_state_dict(pair(size=3).state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        rich.load_state_dict(pair().state_dict() | {"1.weight": torch.zeros(5)})
    with pytest.raises(RuntimeError, match=r"1\.running_var"):
        rich.load_state_dict({k: v for k, v in pair().state_dict().items() if k != "1.running_var"})


@pytest.mark.parametrize("method", [*BRANCHED, *COMPOSED], ids=str)
def test_a_plain_checkpoint_has_no_values_for_layers_without(method):
    rich = foldconv.expand(pair(), method).to("meta")
    with pytest.raises(RuntimeError, match=r"0\.\S+ is on the meta device, .*load the plain network, then expand it"):
        rich.load_state_dict(pair().state_dict(), strict=False, assign=True)
    other = expanded(method)
    rich = foldconv.expand(pair(), method).to("meta")
    rich.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(rich.eval()(X), other.eval()(X))


# ---------------------------------------------------------------------- the norm at its old place


@pytest.mark.parametrize("method", BRANCHED, ids=str)
def test_mode_flags_and_tensors_are_those_of_the_norms_inside(method):
    rich = expanded(method).train()
    rich[1].eval()
    before = copy.deepcopy(rich.state_dict())
    rich(X)
    assert all(torch.equal(v, before[k]) for k, v in rich.state_dict().items())
    rich.train()
    rich(X)
    assert any(not torch.equal(v, before[k]) for k, v in rich.state_dict().items())
    rich.eval()
    inside = [m for m in rich.modules() if isinstance(m, nn.BatchNorm2d)]
    assert rich[1].weight is rich[1].norm.weight
    assert rich[1].norm in inside
    rich[1].requires_grad_(False)
    assert not any(p.requires_grad for m in inside for p in m.parameters())
    rich[1].momentum = 0.5
    assert {m.momentum for m in inside} == {0.5}
    with torch.no_grad():
        nn.init.zeros_(rich[1].weight)
        rich[1].bias = nn.Parameter(torch.ones(4).double())
        before = rich(X)
        rich[1].bias.add_(1)
    assert (rich(X) - before - 1).abs().max() < 1e-12
    names = [name for name, _ in rich.named_parameters()]
    assert len(names) == len(set(names)) == len({id(p) for p in rich.parameters()})
    assert all(name.startswith("0.") for name in names)


@pytest.mark.parametrize("method", [*BRANCHED, "doconv", "dgconv", "orepa", "expandnet"], ids=str)
def test_initializers_by_class_name(method):
    def init(m):
        if "Conv" in type(m).__name__:
            nn.init.normal_(m.weight, 0, 0.02)
        elif "BatchNorm" in type(m).__name__:
            nn.init.normal_(m.weight.data, 1.0, 0.02)
            nn.init.constant_(m.bias.data, 0)

    rich = foldconv.expand(pair(), method)
    before = rich(X)
    assert off(rich.apply(init)(X), before) > 1e-2
    folded = foldconv.fold(rich)
    assert off(folded.eval()(X), rich.eval()(X)) < 1e-10


def test_attributes_of_the_convolution_are_read_and_cannot_be_set():
    rich = expanded("repvgg")
    assert rich[0].stride == (1, 1)
    assert rich[0].weight is rich[0].conv.weight
    assert rich[0].bias is None
    for name, value in {
        "stride": (2, 2),
        "padding": 0,
        "padding_mode": "circular",
        "dilation": 2,
        "weight": None,
    }.items():
        with pytest.raises(foldconv.UnsupportedError, match=rf"^BranchedConv: .* one {name}, .*fold first"):
            setattr(rich[0], name, value)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_an_unbatched_input_is_a_batch_of_one(ndim):
    net = pair(norm=False, ndim=ndim, size=3)
    rich = foldconv.expand(net, "repvgg").eval()
    x = torch.randn(4, *(4,) * ndim).double()
    assert off(rich(x), net(x)) < 1e-12
    with foldconv.composed_once(rich), torch.no_grad():
        assert off(rich(x), net(x)) < 1e-12


@pytest.mark.parametrize("method", [*BRANCHED, "doconv"], ids=str)
def test_parameters_by_children_are_those_of_the_plain_network(method):
    rich = nn.Sequential(nn.Sequential(*foldconv.expand(pair(), method), nn.PReLU().double()), nn.Conv2d(4, 2, 1))
    for net in (rich, copy.deepcopy(rich)):
        groups = [{"params": child.parameters()} for child in (*net[0], net[1])]
        optimizer = torch.optim.SGD(groups, lr=0.1)  # which refuses a parameter in two groups
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in grouped} == {id(p) for p in net.parameters()}
        assert len(grouped) == len(list(net.parameters())) == len(list(net.named_parameters()))
        net[0][0].requires_grad_(False)
        inside = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(p.requires_grad for m in inside for p in m.parameters())
        assert not net[0][0].weight.requires_grad
    assert foldconv.summary(rich).parameters_training == sum(p.numel() for p in rich.parameters())
    alone = copy.deepcopy(rich[0][0])
    assert len(list(alone.parameters())) == len(list(alone.named_parameters()))


UTILITIES = {
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "mask": lambda m: prune.random_unstructured(m, "weight", 2),
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by a hook": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm by a hook": torch.nn.utils.spectral_norm,
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", nn.Softplus()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("how", UTILITIES)
def test_utilities_for_weights_are_told_where_they_are(how):
    use = UTILITIES[how]
    for index, where in ((0, "conv"), (1, "norm")):
        rich = expanded("repvgg").eval()
        before, keys = rich(X), list(rich.state_dict())
        with pytest.raises(
            foldconv.UnsupportedError, match=rf"^weight: .* inside a branched layer; .* its \.{where} .*fold"
        ):
            use(rich[index])
        assert list(rich.state_dict()) == keys
        assert torch.equal(rich(X), before)
        use(getattr(rich[index], where))
        assert (off(rich(X), before) > 1e-3) == ("weight_norm" not in how)  # which keeps the weight as it is
        for batchnorm in (False, True):
            folded = foldconv.fold(rich, batchnorm=batchnorm)
            assert off(folded(X), rich(X)) < 1e-10
            assert batchnorm or folded.state_dict().keys() == pair().state_dict().keys()


# ---------------------------------------------------------------------- the layer and its place check each other


class Between(nn.Module):
    def __init__(self, what, method="repvgg"):
        super().__init__()
        rich = expanded(method)
        self.conv, self.bn, self.what = rich[0], rich[1], what

    def forward(self, x):
        return self.bn(self.what(self.conv(x), x))


WRONG = {
    "added": lambda y, x: y + x,
    "written to": lambda y, x: y.add_(x),
    "activated": lambda y, x: y.relu(),
    "another": lambda y, x: x,
    "part": lambda y, x: y[:, :2],
    "read besides": lambda y, x: (y, y.mean())[0],
    "an array": lambda y, x: torch.from_numpy(y.detach().numpy()),
    "its data written to": lambda y, x: (y.data.mul_(2), y)[1],
    "dropped out": lambda y, x: nn.functional.dropout(y, 0.5, True),
    "reordered": lambda y, x: y.flip(0),
}
RIGHT = {
    "nothing": lambda y, x: y,
    "identity": lambda y, x: nn.Identity()(nn.Dropout().eval()(y)),
    "detached": lambda y, x: y.detach(),
    "viewed": lambda y, x: y.view_as(y),
    "all of it": lambda y, x: y[...].reshape(y.shape),
    "copied": lambda y, x: y.clone().contiguous(memory_format=torch.channels_last).to("cpu"),
    "asked about": lambda y, x: y if y.shape[1] == 4 and y.dtype.is_floating_point and y.dim() == 4 else None,
}
BOTH = r"^bn \(NormPlace\): expected the output of conv \(BranchedConv\), .*exclude= for this convolution"


@pytest.mark.parametrize("how", WRONG)
def test_another_way_raises_at_the_first_forward_naming_both(how):
    for mode in (True, False):
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            net = nn.ModuleDict({"stem": Between(WRONG[how])}).train(mode)["stem"]
            with context(), pytest.raises(foldconv.UnsupportedError, match=BOTH):
                net(X)


@pytest.mark.parametrize("how", RIGHT)
def test_the_same_tensor_passes_whoever_looks_on(how):
    net = Between(RIGHT[how])
    expected = net.bn(net.conv(X))
    for _ in range(2):
        net.train()(X.clone().requires_grad_())
        net.eval()(X)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        net(X)
    for reentrant in (False, True):
        y = checkpoint(net, X.clone().requires_grad_(), use_reentrant=reentrant).sum()
        if how != "detached":
            y.backward()
    net.to(memory_format=torch.channels_last)(X.contiguous(memory_format=torch.channels_last))
    with foldconv.composed_once(net), torch.no_grad():
        net(X)
    hooks = [
        net.conv.register_forward_hook(lambda m, a, y: y),
        net.conv.register_forward_hook(lambda m, a, y: y.contiguous(memory_format=torch.channels_last)),
        net.conv.register_full_backward_hook(lambda m, i, o: None),
        net.bn.register_full_backward_pre_hook(lambda m, o: None),
        net.bn.register_full_backward_hook(lambda m, i, o: None),
    ]
    y = net(X.clone().requires_grad_()).sum()
    if how != "detached":
        y.backward()
    for hook in hooks:
        hook.remove()
    copy.deepcopy(net)(X)
    net.conv(X).mean()  # a look at the layer alone, from no module's code
    received = net(X)
    assert type(received) is torch.Tensor
    assert expected.shape == received.shape


class Ways(nn.Module):
    """May leave the norm out, or begin with it."""

    def __init__(self):
        super().__init__()
        net = pair()
        self.conv, self.bn, self.skips = *net, False

    def forward(self, x):
        y = self.conv(x)
        return (y if self.skips else self.bn(y)).relu()

    def logits(self, x):
        return self.conv(x).relu()

    def embed(self, y):
        return self.bn(y)


def test_an_output_that_does_not_reach_its_place_or_another_that_does_is_seen():
    net = foldconv.expand(Ways().double().eval(), "repvgg")
    right = net(X)
    for wrong in (net.logits, net.embed):
        with pytest.raises(foldconv.UnsupportedError, match=r"NormPlace\): .* conv \(BranchedConv\)"):
            wrong(X)
    net.skips = True
    for context in (torch.enable_grad, torch.inference_mode):
        with context(), pytest.raises(foldconv.UnsupportedError, match=BOTH):
            net(X)
    net.skips = False  # who raised leaves nothing behind
    assert torch.equal(net(X), right)
    net.conv.register_forward_hook(lambda module, args, y: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(X)
    net.conv._forward_hooks.clear()
    assert torch.equal(net(X), right)
    for other in (nn.BatchNorm2d(4).double(), nn.Identity()):
        net.bn = other
        with pytest.raises(foldconv.UnsupportedError, match=r"^conv \(BranchedConv\): .*NormPlace .* is gone"):
            net(X)
    pieces = foldconv.expand(nn.Sequential(*pair(), nn.ReLU()), "repvgg")
    whole = pieces(X)
    front, back = pieces[:1], pieces[2:]
    assert torch.equal(pieces[1:](front(X)), whole)
    with pytest.raises(foldconv.UnsupportedError, match=r"NormPlace: expected the output of 0\.0 \(BranchedConv\)"):
        nn.Sequential(front, back)(X)
    assert front(X).mean().isfinite()  # a part that a script cut off, norm inside, is the script's
    with pytest.raises(foldconv.UnsupportedError, match=r"1 \(NormPlace\): expected the output of BranchedConv"):
        pieces[1:](X)


def test_layers_copied_one_by_one_say_so():
    net = expanded("repvgg").eval()
    apart = nn.Sequential(*[copy.deepcopy(module) for module in net])
    with pytest.raises(foldconv.UnsupportedError, match="copy the network as a whole"):
        apart(X)
    with pytest.raises(foldconv.UnsupportedError, match=r"^1: the norm .* not in this model; copy or cut"):
        foldconv.fold(apart)
    both = nn.Sequential(net[0], copy.deepcopy(net[1]))
    with pytest.raises(foldconv.UnsupportedError, match=r"^1 \(NormPlace\): .* received that of another layer"):
        both(X)
    for whole in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), nn.Sequential(*copy.deepcopy(list(net)))):
        assert off(whole(X), net(X)) < 1e-12
        assert off(foldconv.fold(whole)(X), net(X)) < 1e-10
    shallow = copy.copy(net[1])
    del shallow
    assert off(net(X), foldconv.fold(net)(X)) < 1e-10


def test_gradients_flow_where_the_network_is_split_between_the_two():
    for reentrant in (False, True):
        net = nn.Sequential(*expanded("repvgg").train(), nn.ReLU())
        twin = copy.deepcopy(net)
        gradients = []
        for split in (False, True):
            run = twin if split else net
            x = X.clone().requires_grad_()
            (checkpoint_sequential(run, 3, x, use_reentrant=reentrant) if split else run(x)).pow(2).sum().backward()
            gradients.append([x.grad, *(p.grad for p in run.parameters())])
        assert max(off(a, b) for a, b in zip(*gradients)) < 1e-12


def test_gradients_are_shown_to_who_asks_the_output_for_them():
    net, seen = expanded("repvgg").train(), []

    def watch(module, args, output):
        output.register_hook(lambda gradient: seen.append(gradient))
        output.retain_grad()
        module.kept = output

    net[0].register_forward_hook(watch)
    net(X).pow(2).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], net[0].kept.grad)
    net[0].kept = net[0].kept.detach()
    assert off(foldconv.fold(copy.deepcopy(net)).eval()(X), net.eval()(X)) < 1e-10


@pytest.mark.filterwarnings("ignore")  # the compiler tells that it leaves the hand-over to Python
def test_a_compiled_part_that_begins_with_the_place():
    net = expanded("repvgg")
    net = nn.Sequential(net[0], nn.Sequential(net[1], nn.ReLU()))
    right = net(X)
    net[1].compile(backend="eager")
    assert off(net(X), right) < 1e-12


def test_watchers_for_infinities_and_backward_hooks_before_an_in_place_activation():
    net = expanded("repvgg").append(nn.ReLU(inplace=True))
    calls = []

    def watch(module, inputs, output):
        calls.append(bool(torch.isfinite(output).all()) and not output.isnan().any())

    def gradient():
        x = X.clone().requires_grad_()
        found = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        return torch.cat([g.flatten() for g in found])

    right = gradient()
    for module in net.modules():
        module.register_forward_hook(watch)
    net[0].register_full_backward_hook(lambda *_: None)
    assert off(gradient(), right) < 1e-12
    assert all(calls)
    assert len(calls) >= 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_replicas_and_what_is_compiled_traced_or_scripted_in_parts():
    net = expanded("repvgg").eval()
    expected = net(X)
    replica = nn.Sequential()
    replica._modules = {name: module._replicate_for_data_parallel() for name, module in net.named_children()}
    assert torch.equal(replica(X), expected)
    function = torch.compile(net[0], backend="eager")
    assert off(net[1](function(X)), expected) < 1e-12
    again = copy.deepcopy(net)
    again[0].forward = torch.compiler.disable(again[0].forward)
    with torch.no_grad():  # the compiler itself warns of a tensor with a history
        assert off(torch.compile(again, backend="eager")(X), expected) < 1e-12
    again = copy.deepcopy(net)
    again[0] = torch.jit.trace(again[0], X)
    assert off(again(X), expected) < 1e-12
    traced = torch.fx.symbolic_trace(net)
    assert off(copy.deepcopy(traced)(X), expected) < 1e-12
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert off(torch.vmap(lambda x: net(x[None])[0])(X), expected) < 1e-12


def test_several_calls_and_copies():
    net = expanded("repvgg").eval()
    a, b = net[0](X), net[0](X.flip(0))
    assert off(net[1](a) + net[1](b), net(X) + net(X.flip(0))) < 1e-12
    again = pickle.loads(pickle.dumps(net))
    assert off(again(X), net(X)) < 1e-12
    again[0](X)
    with pytest.raises(foldconv.UnsupportedError, match="NormPlace: expected the output of BranchedConv"):
        again[1](net[0](X))
