"""The checks of what a method's author declares: nothing that `Method` and its layers want can be left out unseen."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layers import ComposedConv
from ..methods import Method, get_method, method_from_json
from ..network.branches import branches
from ..network.expand import expand
from ..network.fold import fold
from .battery import check
from .cases import assert_close, cases, only_layer, randomize, typical
from .checks import EXACT


@check
def describes_itself(method: Method) -> None:
    """The registry's facts are there, the config survives JSON, and the layer knows its config."""
    for fact in ("name", "title", "paper", "adds", "gain"):
        assert isinstance(getattr(method, fact, None), str) and getattr(method, fact), f"no {fact}"
    assert method.kind in ("composable", "statistical"), method.kind
    assert "Example" in (type(method).__doc__ or ""), "the config's docstring has no Example"
    try:
        assert method_from_json(json.loads(json.dumps(method.to_json()))) == method, "the config does not survive JSON"
    except TypeError as error:
        raise AssertionError(f"the config does not survive JSON: {error}") from None
    hash(method)
    layer = only_layer(expand(typical(method).network(), method))
    assert type(layer.method) is type(method), f"the layer's method is {layer.method!r}, and {method!r} made it"


@check
def is_registered(method: Method) -> None:
    """The name leads back to the config's class."""
    assert get_method(method.name) is type(method)


@check
def leaves_nothing_on_the_fold(method: Method) -> None:
    """A fold has the attributes of a plain convolution and what users attached, before `expand` or after."""
    case = typical(method)
    net, x = case.network(), case.input()
    net.conv.attached_before = {"by": "a user"}
    rich = expand(net, method)
    vars(only_layer(rich))["attached_after"] = "too"
    for mode in (True, False):
        rich.train(mode)(x).sum().backward()
    folded = fold(rich)
    expected = {*vars(net.conv), "attached_after"}
    received = {*vars(folded.get_submodule("conv"))}
    assert received >= expected, f"the fold lacks {sorted(expected - received)}"
    assert received <= expected, f"the fold carries the method's {sorted(received - expected)}"


@check
def names_its_parameters(method: Method) -> None:
    """`composed_from` names each parameter but the bias, `no_decay` only parameters of the layer itself."""
    layer = only_layer(expand(typical(method).network(), method))
    own = layer._parameters.keys()
    strangers = sorted(set(layer.no_decay) - own)
    assert not strangers, f"no_decay names {strangers}; expected some of the layer's own parameters {[*own]}"
    if isinstance(layer, ComposedConv):
        names, expected = layer.composed_from, own - {"bias"}
        assert len(names) == len(expected) and {*names} == expected, (
            f"composed_from is {names}; expected each of {sorted(expected)} once"
        )


@check
def the_penalty_is_a_scalar(method: Method) -> None:
    """What the method adds to the loss is None, or a finite scalar with finite gradients."""
    rich = expand(typical(method).network(), method)
    randomize(rich)
    penalty = only_layer(rich).regularization()
    if penalty is None:
        return
    assert isinstance(penalty, Tensor) and penalty.shape == (), f"expected a scalar, received {penalty}"
    penalty.backward()
    gradients = [p.grad for p in rich.parameters() if p.grad is not None]
    assert all(torch.isfinite(value).all() for value in (penalty, *gradients)), (
        "the penalty or its gradient is not finite"
    )


@check
def branches_add_up(method: Method) -> None:
    """The layer's branches are parts of its kernel: together they are the kernel."""
    for case in cases(method)[:6]:
        rich = expand(case.network(), method, init="paper")
        randomize(rich)
        layer = only_layer(rich)
        parts = [kernel.weight for kernel in layer.branch_kernels().values()]
        assert_close(sum(parts[1:], parts[0]), layer.to_kernel().weight, EXACT, f"{case}: the sum of its branches")


@check
def measures_can_be_shown(method: Method) -> None:
    """`foldconv.branches` prints the layer and what it measures, and writes it as JSON."""
    rich = expand(typical(method).network(), method)
    randomize(rich)
    try:
        report = branches(rich)
    except UnsupportedError as error:
        raise AssertionError(str(error)) from None
    json.dumps(report.to_json(), allow_nan=False)
    missing = [name for name in report.layers[0].measures if name not in str(report)]
    assert not missing, f"not printed: {missing}"


@check
def says_what_composing_costs(method: Method) -> None:
    """A kernel made from several parameters costs something to compose; a path is picked by tensors."""
    layer = only_layer(expand(typical(method).network(), method))
    cost = layer.composition_cost()
    assert isinstance(cost, int) and cost >= 0, f"composition_cost: expected an integer ≥ 0, received {cost!r}"
    if isinstance(layer, ComposedConv):
        several = sum(p is not None for name, p in layer._parameters.items() if name != "bias") > 1
        assert cost or not several, "composition_cost is 0, but the kernel is composed of several parameters"
        tensors = layer.composition_tensors()
        picked = tensors is None or (isinstance(tensors, tuple) and all(isinstance(t, Tensor) for t in tensors))
        assert picked, f"composition_tensors: expected a tuple of tensors or None, received {type(tensors).__name__}"
