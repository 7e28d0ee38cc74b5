"""A branched layer and the norm's old place: outsiders reach the convolution and its norm, or are told why not."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import foldconv
from foldconv.testing import randomize

BRANCHED = ("repvgg", "acnet", "dbb", "mobileone", "qarepvgg", "orepa_vgg", foldconv.Dilated(depthwise_only=False))
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
}
RIGHT = {
    "nothing": lambda y, x: y,
    "identity": lambda y, x: nn.Identity()(nn.Dropout().eval()(y)),
    "detached": lambda y, x: y.detach(),
    "viewed": lambda y, x: y.view_as(y),
}


@pytest.mark.parametrize("how", WRONG)
def test_another_way_raises_at_the_first_forward_naming_both(how):
    for mode in (True, False):
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            if how == "written to" and context is torch.inference_mode:
                continue  # nothing counts writing there
            net = nn.ModuleDict({"stem": Between(WRONG[how])}).train(mode)["stem"]
            with (
                context(),
                pytest.raises(foldconv.UnsupportedError, match=r"^bn \(NormPlace\): .* conv \(BranchedConv\)"),
            ):
                net(X)


@pytest.mark.parametrize("how", RIGHT)
def test_the_same_tensor_passes_whoever_looks_on(how):
    net = Between(RIGHT[how])
    for _ in range(2):
        net.train()(X.clone().requires_grad_())
        net.eval()(X)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        net(X)
    y = checkpoint(net, X.clone().requires_grad_(), use_reentrant=False).sum()
    if how != "detached":
        y.backward()
    y = checkpoint(net, X.clone().requires_grad_(), use_reentrant=True).sum()
    if how != "detached":
        y.backward()
    net.to(memory_format=torch.channels_last)(X.contiguous(memory_format=torch.channels_last))
    with foldconv.composed_once(net), torch.no_grad():
        net(X)
    hooks = [
        net.conv.register_forward_hook(lambda m, a, y: y),
        net.conv.register_full_backward_hook(lambda m, i, o: None),
        net.bn.register_full_backward_hook(lambda m, i, o: None),
    ]
    y = net(X.clone().requires_grad_()).sum()
    if how != "detached":
        y.backward()
    for hook in hooks:
        hook.remove()
    copy.deepcopy(net)(X)
    net.conv(X)  # a look at the layer alone
    net(X)


def test_several_calls_and_copies():
    net = expanded("repvgg").eval()
    a, b = net[0](X), net[0](X.flip(0))
    assert off(net[1](a) + net[1](b), net(X) + net(X.flip(0))) < 1e-12
    again = pickle.loads(pickle.dumps(net))
    assert off(again(X), net(X)) < 1e-12
    again[0](X)
    with pytest.raises(foldconv.UnsupportedError, match="NormPlace: expected the output of BranchedConv"):
        again[1](net[0](X))
