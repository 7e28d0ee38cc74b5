"""Which convolutions `expand` replaces: patterns, and what it refuses."""

import mxnet as mx
import pytest
from mxnet import gluon
from mxnet.gluon.model_zoo import vision

from foldconv.errors import NoMatchError, UnsupportedError
from foldconv.gluon import DOConv2D, expand, fold
from foldconv.gluon._tree import named


class Scaled(gluon.nn.Conv2D):
    """A subclass of the convolution that computes something else."""

    def hybrid_forward(self, F, x, weight, bias=None):
        return 2 * super().hybrid_forward(F, x, weight, bias)


def replaced(block):
    return [name for name, layer in named(block) if isinstance(layer, DOConv2D)]


def network():
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 3, in_channels=2), gluon.nn.HybridSequential(), gluon.nn.Conv1D(2, 3))
    net[1].add(gluon.nn.Conv2D(4, 3, in_channels=4), gluon.nn.Conv2D(4, 1, in_channels=4), Scaled(4, 3))
    return net


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ({}, ["0", "1.0"]),
        ({"include": "1.*"}, ["1.0"]),
        ({"include": ["0", "1.0"]}, ["0", "1.0"]),
        ({"exclude": ("1.0", "2")}, ["0"]),
        ({"include": "*", "exclude": "0"}, ["1.0"]),
        ({"include": "[!0]*"}, ["1.0"]),
    ],
)
def test_patterns_are_on_the_names_that_files_have(tmp_path, patterns, names):
    net = network()
    rich = expand(net, "doconv", **patterns)
    assert replaced(rich) == names
    assert replaced(net) == []
    assert {name + ".D" for name in names} <= rich._collect_params_with_prefix().keys()


def test_patterns_reach_into_the_model_zoo():
    net = vision.resnet18_v1()
    stem = expand(net, "doconv", include="features.0")
    assert replaced(stem) == ["features.0"]
    rest = expand(net, "doconv", exclude=["features.0", "features.4.*"])
    assert len(replaced(rest)) == 12
    assert all(name.startswith(("features.5.", "features.6.", "features.7.")) for name in replaced(rest))
    both = expand(stem, "doconv")  # an expanded layer stays, the others follow
    assert len(replaced(both)) == 17


def test_a_layer_under_several_names_is_chosen_by_any_and_left_by_any():
    conv = gluon.nn.Conv2D(4, 3, in_channels=4, padding=1)
    net = gluon.nn.HybridSequential()
    net.add(conv, conv)
    rich = expand(net, "doconv", include="1")
    assert type(rich[0]) is DOConv2D
    assert rich[0] is rich[1]
    with pytest.raises(NoMatchError, match="none of its 2 convolutions is selected by include and exclude"):
        expand(net, "doconv", exclude="1")


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ({"include": "1"}, NoMatchError, r"pattern '1' matches no convolution of HybridSequential; .* '1\.\*'\?"),
        ({"include": "1.9"}, NoMatchError, r"'1.9' matches no .*; did you mean '1\.\d'\?; expected a glob on .* '0'"),
        ({"exclude": ["0", "xyz"]}, NoMatchError, "the pattern 'xyz' matches no convolution"),
        ({"include": "0", "exclude": "0"}, NoMatchError, "none of its 5 convolutions is selected"),
        ({"include": "1.1"}, UnsupportedError, "1.1: Conv2D cannot become doconv: its kernel has one tap"),
        ({"include": "1.2"}, UnsupportedError, r"1.2: Scaled cannot become doconv: .*Scaled is a subclass"),
        ({"include": "2"}, UnsupportedError, "2: Conv1D cannot become doconv: only gluon.nn.Conv2D has"),
        ({"include": "1.[12]"}, NoMatchError, "2 convolutions selected, none of them replaceable; 1.1: its kernel"),
    ],
)
def test_patterns_that_cannot_be_followed(patterns, error, message):
    with pytest.raises(error, match=message) as caught:
        expand(network(), "doconv", **patterns)
    assert "\n" not in str(caught.value)


def test_networks_with_nothing_to_expand():
    with pytest.raises(NoMatchError, match=r"expected convolutions \(gluon.nn.Conv2D\), found none"):
        expand(gluon.nn.Dense(3), "doconv")
    rich = expand(gluon.nn.Conv2D(4, 3, in_channels=2), "doconv")
    with pytest.raises(NoMatchError, match="the root: it is a DO-Conv already"):
        expand(rich, "doconv")


def test_functions_that_were_replaced_and_layers_that_hold_more_are_left_alone():
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 3, in_channels=2), gluon.nn.Conv2D(4, 3, in_channels=2))
    net[0].hybrid_forward = lambda F, x, weight, bias: F.zeros_like(x)
    with net[1].name_scope():
        net[1].mask = net[1].params.get("mask", shape=(4, 2, 3, 3))
    with pytest.raises(UnsupportedError, match="forward was replaced on the instance"):
        expand(net, "doconv", include="0")
    with pytest.raises(UnsupportedError, match="it also holds 'mask'"):
        expand(net, "doconv", include="1")


def test_a_weight_that_another_layer_uses_without_D_is_not_untied():
    first = gluon.nn.Conv2D(4, 3, in_channels=4)
    net = gluon.nn.HybridSequential()
    net.add(first, gluon.nn.Conv2D(4, 3, in_channels=4, params=first.params))
    with pytest.raises(UnsupportedError, match="0 shares its weight with 1, which would stay as it is"):
        expand(net, "doconv", exclude="1")
    net.add(gluon.nn.Conv2D(4, 3, in_channels=8, groups=2, params=first.params))
    with pytest.raises(UnsupportedError, match="2 shares its weight with 0, but not its groups and layout"):
        expand(net, "doconv")
    assert replaced(net) == []


def test_a_frozen_weight_has_a_frozen_D():
    net = network()
    net.initialize()
    net[0].weight.grad_req = "null"
    net[1][0].weight.grad_req = "add"
    rich = expand(net, "doconv", depth_multiplier=11)
    assert [p.grad_req for p in (rich[0].D, rich[0].weight_extra, rich[0].bias)] == ["null", "null", "write"]
    assert [p.grad_req for p in (rich[1][0].D, rich[1][0].weight_extra)] == ["add", "add"]
    assert rich[0].D._grad is None
    x = mx.nd.random.normal(shape=(1, 2, 9, 9))
    with mx.autograd.record():
        loss = rich[1][0](rich[0](x)).sum()
    loss.backward()
    assert float(abs(rich[1][0].D.grad()).max().asscalar()) > 0


@pytest.mark.parametrize("operation", [expand, fold])
@pytest.mark.parametrize("wrong", [None, "net.params"])
def test_what_is_no_block_is_refused(operation, wrong):
    with pytest.raises(TypeError, match=f"block: expected a Block of Gluon, received {wrong!r}"):
        operation(wrong)
