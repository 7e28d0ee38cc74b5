"""The checks of what a method promises its users."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..algebra import kernel_of
from ..algebra.convolutions import PLAIN
from ..errors import FoldMismatchError
from ..files.native import load, save
from ..layers import ComposedConv, Foldable
from ..layers.once import composed_once
from ..methods import Method
from ..network.expand import expand
from ..network.fold import fold
from ..network.parameters import regularization
from .battery import check
from .cases import assert_close, cases, only_layer, randomize, typical

EXACT = 1e-10
PRESERVED = 1e-12


class _Operations(TorchDispatchMode):
    """What torch is asked to compute, by name."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@check
def preserves_the_function(method: Method) -> None:
    """``init="preserve"``: same output before and after `expand`, in evaluation mode."""
    for case in cases(method):
        net, x = case.network(), case.input()
        assert_close(expand(net, method)(x), net(x), PRESERVED, case)


@check
def paper_initialization_is_finite(method: Method) -> None:
    """``init="paper"``: draws anew, finite, of a sensible size."""
    case = typical(method)
    net, x = case.network(), case.input()
    rich = expand(net, method, init="paper").eval()
    y = rich(x)
    assert torch.isfinite(y).all(), "not finite"
    assert not torch.equal(y, net(x)), "init='paper' kept the old values"
    assert 0.01 < (y.std() / net(x).std()).item() < 100, "output of an absurd size"


@check
def folds_exactly(method: Method) -> None:
    """On random parameters and statistics: features = kernel = folded convolution."""
    for case in cases(method):
        net, x = case.network(), case.input()
        rich = expand(net, method)
        randomize(rich)
        layer = only_layer(rich)
        expected = layer.feature_forward(x)
        assert not torch.allclose(expected, net.conv(x), atol=1e-3), f"{case}: random parameters changed nothing"
        assert_close(layer(x), expected, EXACT, f"{case}: forward")
        assert_close(kernel_of(layer)(x), expected, EXACT, f"{case}: kernel_of")
        assert_close(layer.fold()(x), expected, EXACT, f"{case}: fold()")
        assert_close(fold(rich)(x), rich(x), EXACT, f"{case}: the network")
        assert_close(fold(rich, batchnorm=True)(x), rich(x), EXACT, f"{case}: the network, norm absorbed")


@check
def folds_to_a_plain_network(method: Method) -> None:
    """Nothing of the method is left; keys and shapes are the original's; a second fold changes nothing.

    A method that `changes_groups` may fold to more groups, and then to a subclass that reorders channels.
    """
    for case in cases(method):
        net = case.network()
        rich = expand(net, method)
        randomize(rich)
        folded: Any = fold(rich)
        regrouped = method.changes_groups and folded.conv.groups != net.conv.groups
        plain = isinstance(folded.conv, case.cls) if regrouped else type(folded.conv) is case.cls
        assert plain, f"{case}: folded to {type(folded.conv).__name__}"
        # More groups: fewer inputs to an output, and perhaps the order in which the channels are read and written.
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (net, folded)]
        if regrouped:
            shapes[1] = {k: v for k, v in shapes[1].items() if k not in ("conv.input_order", "conv.output_order")}
            out, per_group, *size = shapes[0]["conv.weight"]
            per_group = per_group * net.conv.groups // folded.conv.groups
            shapes[0]["conv.weight"] = torch.Size([out, per_group, *size])
        assert shapes[0] == shapes[1], f"{case}: keys or shapes differ: {shapes[1]}"
        if not regrouped:
            case.network().load_state_dict(folded.state_dict())
        again = fold(folded)
        for key, value in folded.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), f"{case}: a second fold changed {key}"
        for name in ("stride", "padding", "dilation", "groups", "padding_mode"):
            same = getattr(folded.conv, name) == getattr(net.conv, name)
            assert same or (name == "groups" and regrouped), f"{case}: {name} changed"


@check
def folds_the_evaluation_function(method: Method) -> None:
    """From training mode too, and the mode stays."""
    case = typical(method)
    rich, x = expand(case.network(), method), case.input()
    randomize(rich)
    expected = rich.eval()(x)
    folded: Any = fold(rich.train())
    assert all(m.training for m in folded.modules()), "the mode was not kept"
    assert_close(folded.eval()(x), expected, EXACT, case)
    only_layer(rich).fold()
    assert all(m.training for m in rich.modules()), "the expanded network's mode changed"


@check
def every_parameter_learns(method: Method) -> None:
    """Within three steps each parameter gets a gradient, and training changes the function."""
    case = typical(method)
    rich, x = expand(case.network(), method).train(), case.input()
    start, target = rich.eval()(x).detach(), torch.randn_like(rich(x))
    optimizer = torch.optim.SGD(rich.parameters(), lr=0.1)
    layer = only_layer(rich.train())
    reached: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        (nn.functional.mse_loss(rich(x), target) + regularization(rich)).backward()
        reached |= {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    # A bias before a norm that uses batch statistics has no effect; that is so in the plain network too.
    idle = {n for n, p in layer.named_parameters() if p.requires_grad and n.rpartition(".")[2] != "bias"} - reached
    assert not idle, f"no gradient reached {sorted(idle)}"
    assert not torch.allclose(rich.eval()(x), start, atol=1e-4), "three steps changed nothing"


@check
def gradients_are_the_features(method: Method) -> None:
    """Gradients through the layer equal those through its feature evaluation, input's included."""
    for case in cases(method):
        rich, x = expand(case.network(), method), case.input().requires_grad_()
        randomize(rich)
        layer = only_layer(rich.train() if method.kind == "composable" else rich.eval())
        wrt = [x, *(p for _, p in layer.named_parameters() if p.requires_grad)]
        probe = torch.randn_like(layer(x))
        received = torch.autograd.grad((layer(x) * probe).sum(), wrt, allow_unused=True)
        expected = torch.autograd.grad((layer.feature_forward(x) * probe).sum(), wrt, allow_unused=True)
        for a, b in zip(received, expected):
            assert (a is None) == (b is None), f"{case}: a gradient is missing on one side"
            if a is not None and b is not None:
                assert_close(a, b, EXACT, f"{case}: gradient")


@check
def an_unfolded_layer_is_a_convolution(method: Method) -> None:
    """A composable layer is an ``nn.Conv*d`` with ``weight``, ``bias`` and ``kernel()`` of the plain shapes."""
    if method.kind != "composable":
        return
    for case in cases(method):
        net = case.network()
        layer: Any = only_layer(expand(net, method))
        assert isinstance(layer, case.cls), f"{case}: not an instance of {case.cls.__name__}"
        assert layer.weight.shape == net.conv.weight.shape == layer.kernel().shape, f"{case}: weight or kernel()"
        assert (layer.bias is None) == (net.conv.bias is None), f"{case}: bias"


@check
@torch.no_grad()
def evaluates_at_the_folds_cost(method: Method) -> None:
    """Inside `composed_once` a layer runs what its fold runs, and no more; outside it follows its parameters."""
    case = typical(method)
    rich, x = expand(case.network(), method).eval(), case.input()
    randomize(rich)
    layer = only_layer(rich)
    folded = fold(layer)
    with composed_once(rich), _Operations() as inside:
        output = layer(x)
    with _Operations() as wanted:
        expected = folded(x)
    assert_close(output, expected, EXACT, "inside composed_once")
    assert_close(layer(x), expected, EXACT, "outside")
    assert inside.names == wanted.names, f"inside composed_once: expected {wanted.names}, received {inside.names}"
    for _, p in layer.named_parameters():
        p.data.mul_(1.5)  # which raises no version counter
    assert_close(layer(x), fold(layer)(x), EXACT, "after a change of the parameters")


@check
def keeps_flags(method: Method) -> None:
    """dtype, memory format, requires_grad and hooks come through `expand` and `fold`."""
    case = typical(method)
    net = case.network().float()
    if len(case.spatial) == 2:
        net = net.to(memory_format=torch.channels_last)
    net.conv.weight.requires_grad_(False)
    net.conv.register_forward_hook(lambda module, args, output: output * 2)
    x = case.input().float()
    rich: Any = expand(net, method)
    assert not any(p.requires_grad for n, p in only_layer(rich).named_parameters() if "bias" not in n), (
        "frozen was lost"
    )
    folded: Any = fold(rich)
    for model in (rich, folded):
        assert_close(model(x), net(x), 1e-4, "hooks")
    assert folded.conv.weight.dtype == torch.float32, "dtype"
    assert folded.conv.weight.stride() == net.conv.weight.stride(), "memory format"
    assert not folded.conv.weight.requires_grad, "requires_grad"


@check
def folds_half_precision(method: Method) -> None:
    """bfloat16 and float16 parameters: composed in float64 and cast last, once."""
    for dtype in (torch.bfloat16, torch.float16):
        for case in cases(method)[:6]:
            rich = expand(case.network(), method)
            randomize(rich)
            rich = rich.to(dtype)
            expected = kernel_of(only_layer(copy.deepcopy(rich).double())).grouped(1).weight.to(dtype)
            assert {p.dtype for p in fold(rich).parameters()} == {dtype}, f"{case}: the fold has another dtype"
            folded: Any = only_layer(rich).fold()
            assert folded.weight.dtype == dtype, f"{case}: folded to {folded.weight.dtype}"
            received = kernel_of(folded, dtype=None).grouped(1).weight
            assert torch.equal(received, expected), f"{case}: not the float64 kernel, cast"


@check
def composes_in_float32_under_autocast(method: Method) -> None:
    """Under autocast the kernel is not composed in bfloat16."""
    case = typical(method)
    rich = expand(case.network(), method)
    randomize(rich)
    layer, x = only_layer(rich.float()), case.input().float()
    expected = kernel_of(layer, dtype=torch.float32).to_module().weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        if isinstance(layer, ComposedConv):
            kernel = layer.train().kernel()
            assert kernel.dtype == torch.float32, f"kernel() is {kernel.dtype}"
            assert_close(kernel, expected, 1e-6, "kernel() under autocast")
    with torch.autocast("cpu", enabled=False):
        assert_close(y, layer.eval()(x), 5e-2, "output under autocast")


@check
def survives_copies_and_checkpoints(method: Method) -> None:
    """deepcopy, pickle, torch.save, state_dict and `save`/`load` give the same function and training state."""
    case = typical(method)
    net, x = case.network(), case.input()
    rich = expand(net, method)
    randomize(rich)
    expected = rich(x)
    buffer = io.BytesIO()
    torch.save(rich.state_dict(), buffer)
    buffer.seek(0)
    fresh = expand(net, method)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))

    def through_a_file() -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            save(rich, f"{folder}/net.safetensors")
            return load(f"{folder}/net.safetensors", net).eval()

    copies: dict[str, Callable[[], nn.Module]] = {
        "state_dict": lambda: fresh,
        "save and load": through_a_file,
        "deepcopy": lambda: copy.deepcopy(rich),
        "pickle": lambda: pickle.loads(pickle.dumps(rich)),
    }
    for how, make in copies.items():
        model = make()
        assert_close(model(x), expected, PRESERVED, how)
        assert model.state_dict().keys() == rich.state_dict().keys(), f"{how}: other keys"
        randomize(model)
        assert not torch.equal(model(x), expected), f"{how}: a change of the parameters was not seen"
    assert_close(rich(x), expected, PRESERVED, "the original after its copies were changed")


@check
def plain_checkpoints_load(method: Method) -> None:
    """``weight`` and ``bias`` of a composable layer mean the convolution's: a plain state dict gives its function."""
    if method.kind != "composable":
        return
    case = typical(method)
    net, other, x = case.network(), case.network(), case.input()
    rich = expand(net, method)
    result = rich.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys, f"keys of the plain network not understood: {result.unexpected_keys}"
    assert_close(rich(x), other(x), PRESERVED, case)


@check
def compiles(method: Method) -> None:
    """``torch.compile(fullgraph=True)``: same output and gradients as eager."""
    case = typical(method)
    torch.compiler.reset()  # what else was compiled in the process counts against a limit
    for mode in (True, False):
        rich, x = expand(case.network(), method), case.input()
        randomize(rich)
        rich.train(mode)
        expected = copy.deepcopy(rich)
        compiled = torch.compile(rich, fullgraph=True, backend="aot_eager")
        for model in (compiled, expected):
            model(x).square().sum().backward()
        assert_close(compiled(x), expected(x), EXACT, f"training={mode}")
        for (name, p), q in zip(rich.named_parameters(), expected.parameters()):
            if p.grad is not None and q.grad is not None:
                assert_close(p.grad, q.grad, EXACT, f"gradient of {name}, training={mode}")
    torch.compiler.reset()


@check
def refuses_nan(method: Method) -> None:
    """A NaN anywhere in the layer: `fold` raises and names the layer."""
    case = typical(method)
    for name, _ in only_layer(expand(case.network(), method)).named_parameters():
        rich = expand(case.network(), method)
        randomize(rich)
        with torch.no_grad():
            dict(only_layer(rich).named_parameters())[name].view(-1)[0] = float("nan")
        for checked in (True, False):
            try:
                fold(rich, check=checked)
            except FoldMismatchError as error:
                assert "conv" in str(error), f"the message does not name the layer: {error}"
            else:
                raise AssertionError(f"NaN in {name} was folded")


@check
def the_fold_check_bites(method: Method) -> None:
    """A layer whose kernel is wrong is caught by ``check=True``."""
    rich = expand(typical(method).network(), method)
    randomize(rich)
    # Of the class, so that the copies that `fold` makes are wrong, too.
    cls: Any = type(only_layer(rich))
    own, right = vars(cls).get("to_kernel"), cls.to_kernel

    def wrong(self: Any, dtype: Any = torch.float64) -> Any:
        kernel = right(self, dtype)
        return kernel.replace(weight=kernel.weight * 1.000001)

    cls.to_kernel = wrong
    try:
        fold(rich)
    except FoldMismatchError:
        return
    finally:
        if own is None:
            del cls.to_kernel
        else:
            cls.to_kernel = own
    raise AssertionError("a kernel off by one in a million was folded without an error")


@check
def a_convolution_alone_expands(method: Method) -> None:
    """A root convolution becomes a foldable layer and folds back to its class; the original is left alone."""
    case = typical(method)
    conv, x = case.network().conv, case.input()
    before = copy.deepcopy(conv.state_dict())
    rich = expand(conv, method)
    assert isinstance(rich, Foldable), f"the root became {type(rich).__name__}"
    for p in rich.parameters():
        p.data.add_(0.1)
    plain = fold(rich)
    assert type(plain) is case.cls and isinstance(plain, PLAIN), f"folded to {type(plain).__name__}"
    assert_close(plain(x), rich(x), EXACT, case)
    assert all(torch.equal(v, conv.state_dict()[k]) for k, v in before.items()), "the original was changed"
