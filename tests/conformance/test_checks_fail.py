"""No check of the battery passes vacuously: each fails on a method broken for that purpose."""

import copy
import dataclasses

import pytest
import torch

from foldconv import DGConv2d, FoldMismatchError, ops
from foldconv.layers import ComposedConv
from foldconv.methods import DGConv, DOConv, _registry, doconv, get_method
from foldconv.testing import CHECKS


def config_of(layer):
    return get_method("sound")(layer.depth_multiplier, layer.composition)


LAYERS = {
    cls: type(f"Sound{cls.__name__}", (cls,), {"__module__": __name__, "method": property(config_of)})
    for cls in doconv._DOConvNd.ranks.values()
}
globals().update({cls.__name__: cls for cls in LAYERS.values()})  # where pickle looks for them


@dataclasses.dataclass(frozen=True)
class Sound(DOConv):
    """DO-Conv under another name. Example: the mutants below."""

    name = "sound"

    def expand(self, conv, init="preserve", norm=None):
        layer = super().expand(conv, init)
        layer.__class__ = self.remake(LAYERS[type(layer)])
        return self.touch(layer)

    def remake(self, cls):
        return cls

    def touch(self, layer):
        return layer


def layer_with(**overrides):
    """A method whose layers override some methods; each override gets the original as its first argument."""

    def remake(self, cls):
        def bind(name, function):
            return lambda layer, *args, **kwargs: function(
                getattr(super(mutant, layer), name, None), layer, *args, **kwargs
            )

        mutant = type(cls.__name__, (cls,), {})
        for name, function in overrides.items():
            setattr(mutant, name, bind(name, function))
        return mutant

    return broken(remake=remake)


def broken(**attributes):
    """A method with some class attributes replaced."""
    return dataclasses.dataclass(frozen=True)(type("Broken", (Sound,), {"__doc__": Sound.__doc__, **attributes}))


def regrouped(**attributes):
    """DGConv with some class attributes replaced, its gates closed."""

    def expand(self, conv, init="preserve", norm=None):
        layer = DGConv.expand(self, conv, init)
        layer.gates.data.fill_(-1)
        layer.__class__ = type(type(layer).__name__, (type(layer),), attributes.get("layer", {}))
        return layer

    own = {"__doc__": Sound.__doc__, "name": "sound", "expand": expand, **attributes}
    return dataclasses.dataclass(frozen=True)(type("Regrouped", (DGConv,), own))


def realized_with(change):
    def realize(layer, kernel):
        plain = DGConv2d.realize(layer, kernel)
        change(plain)
        return plain

    return regrouped(layer={"realize": realize})


def enlarge_window(plain):
    """The same function with a zero tap more on each side of the last dimension."""
    plain.weight = torch.nn.Parameter(torch.nn.functional.pad(plain.weight, (1, 1)))
    plain.padding = (*plain.padding[:-1], plain.padding[-1] + 1)


def add_to_D(value):
    def touch(self, layer):
        layer.D.data.add_(value)
        return layer

    return broken(touch=touch)


def forgetful_copy(original, layer, memo):
    new = type(layer).__new__(type(layer))
    new.__dict__.update(copy.deepcopy(vars(layer), memo))
    new.D.data.zero_()
    return new


def load_then_add(original, layer, *args):
    original(*args)
    layer.D.data.add_(1e-3)


def composed_under_autocast(original, layer):
    with ops.using("torch"):  # compiled loops know nothing of autocast
        return layer.compose(*(getattr(layer, name) for name in layer.composed_from))


def regardless(original, layer, x, output_size=None):
    return ComposedConv.forward.__wrapped__(layer, x, output_size)


def never_forget(original, layer):
    if "first" not in vars(layer):
        vars(layer)["first"] = original().detach()
    return vars(layer)["first"]


def switch_mode(original, layer, dtype=torch.float64):
    layer.training = False
    return original(dtype)


def scaled(factor):
    return lambda original, layer, *tensors: original(*tensors) * factor


def steeper(original, layer, *tensors):
    kernel = original(*tensors)
    return kernel + 0.1 * (kernel - kernel.detach())


def when_compiling(original, layer, x, output_size=None):
    return original(x) * (1.01 if torch.compiler.is_compiling() else 1.0)


def zero_bias(original, layer, dtype=torch.float64):
    kernel = original(dtype)
    return kernel.replace(bias=kernel.weight.new_zeros(kernel.out_channels)) if kernel.bias is None else kernel


def composed_in_own_dtype(original, layer, dtype=torch.float64):
    kernel = original(None)
    return kernel.replace(weight=kernel.weight.to(dtype), bias=None if kernel.bias is None else kernel.bias.to(dtype))


def without_nan(original, layer, dtype=torch.float64):
    kernel = original(dtype)
    bias = None if kernel.bias is None else kernel.bias.nan_to_num()
    return kernel.replace(weight=kernel.weight.nan_to_num(), bias=bias)


def through_the_kernel(original, layer, x, output_size=None):
    return layer.to_kernel()(x)


def thaw(self, layer):
    return layer.requires_grad_(True)


def with_option(kind, default):
    own = {"__doc__": Sound.__doc__, "__annotations__": {"option": kind}, "option": default}
    return dataclasses.dataclass(frozen=True)(type("Broken", (Sound,), own))


def of_layer(**attributes):
    """A method whose layers have some class attributes replaced."""
    return broken(remake=lambda self, cls: type(cls.__name__, (cls,), attributes))


def note_kernel(compose, layer, *tensors):
    layer.last = compose(*tensors)
    return layer.last


def noted(plain):
    plain.noted = True
    return plain


def keep_nothing(self, conv, init="preserve", norm=None):
    del conv.attached_before
    return Sound.expand(self, conv, init)


def penalized(penalty):
    return broken(penalty=lambda self, layer: penalty(layer))


def first_only(compose_branches, layer, *tensors):
    (name, kernel), *_ = compose_branches(*tensors).items()
    return {name: kernel}


def measuring(value):
    return layer_with(measures=lambda measures, layer: measures() | {"new": value})


MUTANTS = {
    "describes_itself": [
        broken(gain=""),
        broken(kind="magic"),
        broken(__doc__="No runnable part."),
        with_option(tuple, (1, 2)),
        with_option(torch.dtype, torch.float32),
        of_layer(method=DOConv()),
    ],
    "is_registered": [broken(name="doconv")],
    "preserves_the_function": [add_to_D(1e-9)],
    "paper_initialization_is_finite": [
        broken(expand=lambda self, conv, init="preserve", norm=None: Sound.expand(self, conv, "preserve")),
        add_to_D(float("nan")),
        add_to_D(1e6),
    ],
    "folds_exactly": [layer_with(compose=scaled(1 + 1e-8)), layer_with(feature_forward=scaled(1 + 1e-8))],
    "folds_to_a_plain_network": [
        layer_with(to_kernel=zero_bias),
        regrouped(changes_groups=False),
        realized_with(lambda plain: plain.register_buffer("gates", torch.zeros(1))),
        realized_with(enlarge_window),
    ],
    "folds_the_evaluation_function": [layer_with(to_kernel=switch_mode)],
    "every_parameter_learns": [layer_with(compose=lambda compose, layer, w, D, e: compose(w, D.detach(), e))],
    "gradients_are_the_features": [layer_with(compose=steeper)],
    "an_unfolded_layer_is_a_convolution": [layer_with(kernel=lambda kernel, layer: kernel().flatten(1))],
    "evaluates_at_the_folds_cost": [layer_with(forward=regardless), layer_with(kernel=never_forget)],
    "keeps_flags": [broken(touch=thaw)],
    "folds_half_precision": [layer_with(to_kernel=composed_in_own_dtype)],
    "composes_in_float32_under_autocast": [layer_with(kernel=composed_under_autocast)],
    "survives_copies_and_checkpoints": [
        layer_with(__deepcopy__=forgetful_copy),
        layer_with(_load_from_state_dict=load_then_add),
    ],
    "plain_checkpoints_load": [layer_with(_load_from_state_dict=load_then_add)],
    "compiles": [layer_with(forward=when_compiling)],
    "refuses_nan": [layer_with(to_kernel=without_nan)],
    "the_fold_check_bites": [layer_with(feature_forward=through_the_kernel, forward=through_the_kernel)],
    "leaves_nothing_on_the_fold": [
        layer_with(compose=note_kernel),
        layer_with(realize=lambda realize, layer, kernel: noted(realize(kernel))),
        broken(expand=keep_nothing),
    ],
    "names_its_parameters": [
        of_layer(composed_from=("weight", "D", "weight_extra", "E")),
        of_layer(composed_from=("weight", "weight_extra")),
        of_layer(no_decay=frozenset({"d"})),
    ],
    "the_penalty_is_a_scalar": [
        penalized(lambda layer: layer.D.square().sum(0)),
        penalized(lambda layer: layer.D.sum() * float("inf")),
        penalized(lambda layer: (layer.D - layer.D.detach()).abs().sum().sqrt()),
        penalized(lambda layer: 0.1),
    ],
    "branches_add_up": [layer_with(compose_branches=first_only)],
    "measures_can_be_shown": [
        measuring(torch.zeros(2)),
        measuring([0.5, "much"]),
    ],
    "says_what_composing_costs": [
        layer_with(composition_cost=lambda original, layer: 0),
        layer_with(composition_cost=lambda original, layer: 0.5),
        layer_with(composition_tensors=lambda original, layer: layer.D),
    ],
    "a_convolution_alone_expands": [broken(expand=lambda self, conv, init="preserve", norm=None: conv)],
}
PAIRS = [(name, mutant) for name, mutants in MUTANTS.items() for mutant in mutants]


@pytest.fixture
def register(monkeypatch):
    def use(cls):
        monkeypatch.setattr(_registry, "_METHODS", {"doconv": DOConv, Sound.name: Sound} | {cls.name: cls})
        return cls()

    return use


def test_every_check_has_a_mutant():
    assert MUTANTS.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_method_passes(register, name):
    CHECKS[name](register(Sound))


@pytest.mark.parametrize(("name", "mutant"), PAIRS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PAIRS)])
def test_a_broken_method_fails(register, name, mutant):
    config = register(mutant)
    if name == "is_registered":
        register(DOConv)
    with pytest.raises((AssertionError, FoldMismatchError)):
        CHECKS[name](config)
