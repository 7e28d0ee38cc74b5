"""Which pairs data flow proves, and every way in which order, names or habit would suggest a wrong one."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import foldconv
from foldconv.network.dataflow import DataFlow


def pairs(model):
    """The proven pairs by name."""
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    return {names[conv]: names[norm] for conv, norm in DataFlow(model).pairs.items()}


class Net(nn.Module):
    """Two convolutions and two norms for one test's own forward."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)


# ---------------------------------------------------------------------- what is proven


def test_pairs_follow_the_flow_not_the_order():
    class Crossed(Net):
        def forward(self, x):
            return self.norm2(self.conv1(F.relu(self.norm1(self.conv2(x)))))

    assert pairs(Crossed()) == {"conv1": "norm2", "conv2": "norm1"}


def test_norm_before_convolution_is_no_pair():
    class PreActivation(Net):
        def forward(self, x):
            return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))

    assert pairs(PreActivation()) == {"conv1": "norm2"}


def test_foldable_layers_pair_like_plain_ones():
    class Straight(Net):
        def forward(self, x):
            return self.norm2(self.conv2(self.norm1(self.conv1(x))))

    assert pairs(foldconv.expand(Straight(), "doconv")) == {"conv1": "norm1", "conv2": "norm2"}


def test_module_under_two_names_called_once():
    class Alias(Net):
        def __init__(self):
            super().__init__()
            self.again = self.conv1

        def forward(self, x):
            return self.norm1(self.again(x))

    assert pairs(Alias()) == {"conv1": "norm1"}


def test_hidden_list_of_registered_modules():
    class Listed(Net):
        def __init__(self):
            super().__init__()
            self.order = [self.conv2, self.norm1, self.conv1, self.norm2]

        def forward(self, x):
            for module in self.order:
                x = module(x)
            return x

    assert pairs(Listed()) == {"conv1": "norm2", "conv2": "norm1"}


@pytest.mark.parametrize("model", [nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), nn.Sequential()])
def test_nothing_to_pair(model):
    assert pairs(model) == {}


def test_rank_and_transposed():
    net = nn.Sequential(
        nn.Sequential(nn.Conv1d(1, 1, 3), nn.BatchNorm1d(1)),
        nn.Sequential(nn.ConvTranspose3d(1, 1, 3), nn.BatchNorm3d(1)),
    )
    assert pairs(net) == {"0.0": "0.1", "1.0": "1.1"}


# ---------------------------------------------------------------------- what is not


def output_used_twice(self, x):
    y = self.conv1(x)
    return self.norm1(y) + y


def output_returned_too(self, x):
    y = self.conv1(x)
    return self.norm1(y), y


def output_seen_by_two_norms(self, x):
    y = self.conv1(x)
    return self.norm1(y) + self.norm2(y)


def activation_between(self, x):
    return self.norm1(F.relu(self.conv1(x)))


def inplace_change_between(self, x):
    y = self.conv1(x)
    y.add_(1)
    return self.norm1(y)


def sum_between(self, x):
    return self.norm1(self.conv1(x) + self.conv2(x))


def called_twice(self, x):
    return self.norm1(self.conv1(self.conv1(x)))


def norm_called_twice(self, x):
    return self.norm1(self.conv2(self.norm1(self.conv1(x))))


def weight_used(self, x):
    return self.norm1(self.conv1(x)) + F.conv2d(x, self.conv1.weight, padding=1)


def weight_used_without_input(self, x):
    return self.norm1(self.conv1(x)) + sum(p.square().sum() for p in self.conv1.parameters())


def weight_used_in_a_list(self, x):
    return self.norm1(self.conv1(x)) + torch.stack(list(self.conv1._parameters.values())[:1]).sum()


def statistics_used(self, x):
    return self.norm1(self.conv1(x)) - self.norm1.running_mean.sum()


def norm_weight_used(self, x):
    return self.norm1(self.conv1(x)) * self.norm1.weight.sum()


def output_kept(self, x):
    self.features = self.conv1(x)
    return self.norm1(self.features)


def output_kept_in_a_list(self, x):
    self.seen = [{"y": self.conv1(x)}]
    return self.norm1(self.seen[0]["y"])


def only_while_training(self, x):
    y = self.conv1(x)
    return self.norm1(y) if self.training else y


def only_for_tensors(self, x):
    y = self.conv1(x)
    return y * 2 if isinstance(y, torch.Tensor) else self.norm1(y)


def only_if_torch_says_tensor(self, x):
    y = self.conv1(x)
    return y * 2 if torch.is_tensor(y) else self.norm1(y)


def by_data(self, x):
    y = self.conv1(x)
    return self.norm1(y) if y.sum() > 0 else y


def by_number(self, x):
    y = self.conv1(x)
    return self.norm1(y) if float(y.sum()) > 0 else y


def by_shape(self, x):
    y = self.conv1(x)
    return self.norm1(y) if y.shape[-1] > 8 else y


def by_argument(self, x, features=False):
    y = self.conv1(x)
    return y if features else self.norm1(y)


def by_optional_argument(self, x, scale=None):
    y = self.conv1(x)
    if scale is not None:
        y = y * scale
    return self.norm1(y)


def by_a_mixture_of_arguments(self, x, a=None, b=None):
    y = self.conv1(x)
    if a is not None and b is None:
        y = y * a
    return self.norm1(y)


def by_the_class_of_a_shape(self, x):
    y = self.conv1(x)
    return y * 2 if isinstance(y.shape, tuple) else self.norm1(y)


def by_a_member_of_a_value(self, x):
    y = self.conv1(x)
    return self.norm1(y) if hasattr(y, "tensors") else y * 2


def by_keyword(self, x, *, skip=None):
    y = self.conv1(x)
    return self.norm1(y if skip is None else skip)


def as_keyword_argument(self, x):
    return self.norm1(input=self.conv1(input=x))


def no_call_at_all(self, x):
    return F.batch_norm(self.conv1(x), self.norm1.running_mean, self.norm1.running_var)


UNPROVEN = [
    output_used_twice,
    output_returned_too,
    output_seen_by_two_norms,
    activation_between,
    inplace_change_between,
    sum_between,
    called_twice,
    norm_called_twice,
    weight_used,
    weight_used_without_input,
    weight_used_in_a_list,
    statistics_used,
    norm_weight_used,
    output_kept,
    output_kept_in_a_list,
    only_while_training,
    only_for_tensors,
    only_if_torch_says_tensor,
    by_data,
    by_number,
    by_shape,
    by_argument,
    by_optional_argument,
    by_a_mixture_of_arguments,
    by_the_class_of_a_shape,
    by_a_member_of_a_value,
    by_keyword,
    as_keyword_argument,
    no_call_at_all,
]


OPTIONAL = (by_argument, by_optional_argument, by_keyword, by_a_mixture_of_arguments)


@pytest.mark.parametrize("forward", UNPROVEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("nested", [False, True])
def test_unproven(forward, nested):
    net = type("Net", (Net,), {"forward": forward})()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), net) if nested else net
    # Called with its defaults and nested, optional arguments are known.
    proven = {"2.conv1": "2.norm1"} if nested and forward in OPTIONAL else {}
    assert pairs(model) == ({"0": "1"} if nested else {}) | proven


WHY = {
    output_used_twice: "its output is read in 2 places",
    activation_between: "its output goes to relu, no batch norm module",
    called_twice: "its output goes to Conv2d, no batch norm module",
    norm_called_twice: "norm1 alone reads its output; but of norm1, it is also called with other inputs",
    weight_used: "the model reads its tensors outside of it",
    output_kept: "its output is kept",
    output_returned_too: "its output is read in 2 places",
    by_data: "its output is read in 2 places",
    by_number: "it is called by the root (Net), which cannot be traced",
    by_optional_argument: "its output goes to mul, no batch norm module",
    no_call_at_all: "its output goes to batch_norm, no batch norm module",
    as_keyword_argument: "it is not called with its input alone",
}


@pytest.mark.parametrize("forward", WHY, ids=lambda f: f.__name__)
def test_why_not(forward):
    net = type("Net", (Net,), {"forward": forward})()
    assert DataFlow(net).why(net.conv1) == WHY[forward]


def test_why_of_other_modules():
    class Odd(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), Odd(1, 1, 3), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3))
    net[4].register_forward_hook(lambda *args: None)
    flow = DataFlow(net)
    assert [flow.why(module) for module in net] == [
        "1 alone reads its output",
        "it is no convolution",
        f"{__name__}.Odd is a subclass with its own forward, so it may compute another function",
        "it is no convolution",
        "it has hooks, or a forward of its own",
    ]
    assert flow.why(nn.Conv2d(1, 1, 1)) == "it is never called"
    assert DataFlow(net[0]).why(net[0]) == "it is called by nobody that can be seen"
    net[0].weight = net[2].weight
    assert DataFlow(net).why(net[0]) == "another module holds a parameter of it too"


def test_why_where_nothing_can_be_followed():
    class Uncopyable(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("holds a socket")

    net = Uncopyable(nn.Conv2d(1, 1, 3))
    assert DataFlow(net).read == set()
    assert "cannot be copied (RuntimeError: holds a socket)" in DataFlow(net).why(net[0])


def test_why_below_code_that_may_do_anything():
    net = type("Made", (Opaque,), {"forward": iterates})()
    assert DataFlow(net).why(net.child[0]) == "the root (Made), which cannot be traced, may use it in any way"


def test_modules_whose_weight_the_model_reads():
    net = type("Net", (Net,), {"forward": weight_used})()
    assert DataFlow(net).read == {net.conv1}
    net = type("Net", (Net,), {"forward": statistics_used})()
    assert DataFlow(net).read == {net.norm1}


CPU = torch.device("cpu")


def test_optional_arguments_that_do_not_matter():
    class Net2(Net):
        def forward(self, x, mask=None, size=(1, 2), device=CPU):
            y = self.norm1(self.conv1(x))
            return y if mask is None else y * mask

    assert pairs(Net2()) == {"conv1": "norm1"}


@pytest.mark.parametrize(
    "register",
    [f"register_{kind}_hook" for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")],
)
@pytest.mark.parametrize("where", ["0.0", "0.1", "0"])
def test_hooks_see_what_would_vanish(register, where):
    net = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)), nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    getattr(net.get_submodule(where), register)(lambda *args: None)
    assert pairs(net) == {"1": "2"}


def test_tied_weights():
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    net[0].weight = net[2].weight
    assert pairs(net) == {}


def test_pair_called_several_times():
    block = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    assert pairs(nn.Sequential(block, nn.ReLU(), block)) == {"0.0": "0.1"}
    assert pairs(nn.Sequential(block, nn.ReLU(), block[0])) == {}
    assert pairs(nn.Sequential(block, nn.ReLU(), block[1])) == {}
    assert pairs(nn.Sequential(block, nn.Sequential(nn.Conv2d(1, 1, 3), block[1]))) == {}


def test_subclasses_may_compute_anything():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) ** 2

    assert pairs(nn.Sequential(Standardized(1, 1, 3), nn.BatchNorm2d(1))) == {}
    assert pairs(nn.Sequential(nn.Conv2d(1, 1, 3), Odd(1))) == {}


@pytest.mark.parametrize("where", ["0", "1", ""])
def test_forward_replaced_on_the_instance(where):
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    net.get_submodule(where).forward = lambda x: x
    assert pairs(net) == {}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_computed_weights(norm):
    assert pairs(nn.Sequential(norm(nn.Conv2d(1, 1, 3)), nn.BatchNorm2d(1))) == {}


# ---------------------------------------------------------------------- what cannot be traced


def block():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


class DataDependent(nn.Module):
    """Calls its child as often as the data says, and its own pair in a way that nobody can follow."""

    def __init__(self):
        super().__init__()
        self.child = block()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        while float(x.abs().sum()) < 10:
            x = self.child(x) + 1
        return self.norm(self.conv(x))


def test_parametrized_norms():
    net = block()
    before = DataFlow(net).why(net[0])
    parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    assert before == "1 alone reads its output"
    why = "its output goes to 1, a norm with a computed weight; remove the parametrization"
    assert DataFlow(net).why(net[0]) == why


def test_opaque_root_whose_source_only_calls_its_child():
    assert pairs(DataDependent()) == {"child.0": "child.1"}


def test_opaque_submodule():
    found = pairs(nn.Sequential(block(), DataDependent(), DataDependent(), block()))
    assert found == {"0.0": "0.1", "1.child.0": "1.child.1", "2.child.0": "2.child.1", "3.0": "3.1"}


def test_opaque_modules_within_opaque_modules():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = DataDependent()

        def forward(self, x):
            return self.inner(x) if len(x) else x

    assert pairs(Outer()) == {"inner.child.0": "inner.child.1"}


def test_opaque_module_called_twice():
    inner = DataDependent()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, times=None):
            return self.inner(self.inner(x))

    assert pairs(Outer()) == {"inner.child.0": "inner.child.1"}


def reaches_inside(self, x):
    return self.child[0](x) if float(x.sum()) > 0 else self.child(x)


def iterates(self, x):
    for module in self.child:
        x = module(x) if float(x.sum()) > 0 else x
    return x


def reads_inside(self, x):
    return self.child(x) * self.child[0].weight.sum() if float(x.sum()) > 0 else x


def passes_self(self, x):
    return helper(self, x)


def passes_child(self, x):
    return run(self.child, x)


def gives_self_another_name(self, x):
    this = self
    return this.child[0](x) if float(x.sum()) > 0 else x


def looks_at_children(self, x):
    return next(self.children())[0](x) if float(x.sum()) > 0 else x


def looks_at_modules(self, x):
    return self._modules["child"][0](x) if float(x.sum()) > 0 else x


def looks_by_name(self, x):
    return self.get_submodule("child.0")(x) if float(x.sum()) > 0 else x


def looks_with_super(self, x):
    return super(type(self), self).get_submodule("child.0")(x) if float(x.sum()) > 0 else x


def looks_with_getattr(self, x):
    return getattr(self, "child")[0](x) if float(x.sum()) > 0 else x  # noqa: B009


def looks_in_a_closure(self, x):
    def inside():
        return self.child[0](x)

    return inside() if float(x.sum()) > 0 else x


def exchanges_the_child(self, x):
    self.child = self.child if float(x.sum()) > 0 else nn.Identity()
    return self.child(x)


def helper(module, x):
    return module.child[0](x) if float(x.sum()) > 0 else x


def run(module, x):
    return module[0](x) if float(x.sum()) > 0 else x


REACHING = [
    reaches_inside,
    iterates,
    reads_inside,
    passes_self,
    passes_child,
    gives_self_another_name,
    looks_at_children,
    looks_at_modules,
    looks_by_name,
    looks_with_super,
    looks_with_getattr,
    looks_in_a_closure,
    exchanges_the_child,
]


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = block()
        self.free = block()

    def other(self, x):
        return self.free(x)


@pytest.mark.parametrize("forward", REACHING, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [None, property, staticmethod])
def test_opaque_module_that_may_reach_past_its_childs_forward(forward, kind):
    members = {"forward": forward} if kind is None else {"forward": only_calls, "another": kind(forward)}
    assert "child.0" not in pairs(type("Made", (Opaque,), members)())


def only_calls(self, x):
    return self.child(x) if float(x.sum()) > 0 and self.child is not None else self.other(x)


def reaches_only_the_other(self, x):
    return self.child(x) if float(x.sum()) > 0 else self.free[0](x)


stray = block()


def uses_a_global(self, x):
    return self.child(x) if float(x.sum()) > 0 else stray(x)


@torch.no_grad()
def is_decorated(self, x):
    return self.child(x) if float(x.sum()) > 0 else x


def made(forward):
    return pairs(type("Made", (Opaque,), {"forward": forward})())


def test_control_of_the_test_above():
    assert made(only_calls) == {"child.0": "child.1", "free.0": "free.1"}
    assert made(reaches_only_the_other) == {"child.0": "child.1"}


def test_methods_that_cannot_be_judged():
    assert made(uses_a_global) == {}
    assert made(is_decorated) == {}
    assert made(lambda self, x: self.child(x) if float(x.sum()) > 0 else x) == {}


def test_child_of_an_opaque_module_that_another_module_reaches():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = DataDependent()

        def forward(self, x):
            return self.inner(x) + self.inner.child[0](x)

    assert pairs(Outer()) == {}


def test_child_of_an_opaque_module_whose_weight_another_module_reads():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = DataDependent()

        def forward(self, x):
            return self.inner(x) * self.inner.child[0].weight.sum()

    assert pairs(Outer()) == {}


def test_child_of_an_opaque_module_registered_elsewhere_too():
    inner = DataDependent()
    other = nn.ModuleList([inner.child[0]])

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = inner, other

        def forward(self, x):
            return self.inner(x) if float(x.sum()) > 0 else self.other[0](x)

    assert pairs(Outer()) == {}


def test_opaque_module_with_a_hidden_reference():
    class Hiding(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.convs = [conv]

        def forward(self, x):
            return self.convs[0](x) if float(x.sum()) > 0 else x

    pair = block()
    assert pairs(nn.Sequential(pair, Hiding(pair[0]))) == {}
    assert pairs(nn.Sequential(pair, Hiding(nn.Conv2d(1, 1, 1)))) == {"0.0": "0.1"}


def test_source_that_cannot_be_had():
    scope = {"nn": nn, "block": block}
    exec(
        "class Made(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.child = block()\n"
        "    def forward(self, x):\n        return self.child(x) if float(x.sum()) > 0 else x\n",
        scope,
    )
    assert pairs(scope["Made"]()) == {}


def test_what_certainly_is_a_tensor_may_be_asked_for_its_class():
    class Asks(Net):
        def forward(self, x):
            y = self.norm1(self.conv1(x))
            y = torch.cat([y, y[:, :2]], 1).mean((2, 3), keepdim=True) * y[:, :1]
            return y if isinstance(y, (list, tuple)) else self.norm2(self.conv2(y[:, :4]))

    class AsksForMore(Net):
        def forward(self, x):
            y, z = self.norm1(self.conv1(x)), F.max_pool2d(x, 2, return_indices=True)
            return y if isinstance(z, torch.Tensor) else y + z[0]

    assert pairs(Asks()) == {"conv1": "norm1", "conv2": "norm2"}
    assert pairs(AsksForMore()) == {}


def summed(module, x):
    return x * module.weight.sum()


def by_its_name(self, x):
    return x * self.conv.weight.sum()


def in_a_list(self, x):
    return x * self.convs[0].bias.sum()


def under_another_name(self, x):
    conv = self.conv
    return x * conv.weight.sum()


def by_getattr(self, x):
    return x * getattr(self.conv, "weight").sum()  # noqa: B009


def with_all_others(self, x):
    return x * sum(p.sum() for p in self.parameters())


def as_a_state(self, x):
    return x * self.conv.state_dict()["weight"].sum()


def in_a_function(self, x):
    return summed(self.conv, x)


def nothing_but_its_type(self, x):
    return x.to(self.conv.weight.dtype).to(next(self.parameters()).device)


READING = [by_its_name, in_a_list, under_another_name, by_getattr, with_all_others, as_a_state, in_a_function]


class ReadsUntraceably(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.convs = nn.ModuleList([self.conv])

    def forward(self, x):
        return x if float(x.sum()) > 1e9 else self.conv(self.read(x))


@pytest.mark.parametrize("read", [*READING, nothing_but_its_type], ids=lambda f: f.__name__)
def test_weights_that_untraceable_code_reads(read):
    net = type("Made", (ReadsUntraceably,), {"read": read})()
    assert (net.conv in DataFlow(net).read) == (read in READING)


class Switchable(nn.Module):
    """Norms that take turns, as an attribute says."""

    def __init__(self, norms):
        super().__init__()
        self.conv, self.norms, self.which = nn.Conv2d(3, 3, 1), norms, "0"

    def forward(self, x):
        return self.norms.get_submodule(self.which)(self.conv(x))


def test_norms_that_may_take_their_turn():
    wrapped = [nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2)]
    for norms in ([nn.BatchNorm2d(3), nn.BatchNorm2d(3)], wrapped):
        net = Switchable(nn.ModuleList(norms))
        assert pairs(net) == {}
        assert "norms.1" in DataFlow(net).why(net.conv)
    assert pairs(Switchable(nn.ModuleList(norms[:1]))) == {"conv": "norms.0.0"}
    # A path of another domain's takes its turn with convolutions of its own.
    path = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net = Switchable(nn.ModuleList([norms[0], path]))
    assert pairs(net) == {}
    assert "norms.1 stands beside it" in DataFlow(net).why(net.conv)
    # What takes another number of channels cannot.
    assert pairs(Switchable(nn.ModuleList([norms[0], nn.Sequential(nn.Conv2d(4, 3, 1))]))) == {"conv": "norms.0.0"}


class Choosing(nn.Module):
    """Convolutions and norms side by side, of which the first are called."""

    def __init__(self, **more):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.norm(self.conv(x))


class FilterResponseNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))


def test_who_may_take_a_turn_by_its_place_and_its_channels():
    def conv(channels=3):
        return nn.Conv2d(3, channels, 3)

    pair = {"conv": "norm"}
    for more, expected in (
        ({"other": nn.BatchNorm2d(3)}, {}),
        ({"other": nn.GroupNorm(1, 3)}, {}),
        ({"other": nn.InstanceNorm2d(3)}, {}),
        ({"other": FilterResponseNorm(3)}, {}),
        ({"other": nn.Sequential(nn.GroupNorm(3, 3), nn.ReLU())}, {}),
        ({"others": nn.ModuleDict({"b": nn.GroupNorm(3, 3)})}, {}),
        ({"other": nn.BatchNorm2d(3), "skip": conv()}, {}),
        ({"other": conv()}, {}),
        ({"others": nn.ModuleList([conv()])}, {}),
        ({"other": nn.BatchNorm2d(4)}, pair),
        ({"other": conv(4)}, pair),
        ({"other": nn.PReLU(3), "drop": nn.Dropout(), "same": nn.Identity()}, pair),
        ({"skip": conv(), "skip_norm": nn.BatchNorm2d(3)}, pair),
        ({"skips": nn.ModuleList([conv(), nn.GroupNorm(1, 3)])}, pair),
        ({"other": nn.Sequential(conv(), nn.BatchNorm2d(3))}, pair),
    ):
        net = Choosing(**more)
        assert pairs(net) == expected, more
        assert bool(DataFlow(net, torch.randn(2, 3, 4, 4)).pairs) is bool(expected), more


def test_a_weight_that_the_source_names():
    class Named(Choosing):
        raw = False

        def forward(self, x):
            y = self.conv(x)
            return y * self.scale() if self.raw else self.norm(y)

        def scale(self):
            return self.norm.weight.view(1, -1, 1, 1)

    net = Named()
    assert pairs(net) == {}
    why = "norm alone reads its output; but of norm, the model reads its tensors outside of it"
    assert DataFlow(net).why(net.conv) == why

    class Sized(Named):
        def scale(self):
            return self.norm.weight.shape[0]

    assert pairs(Sized()) == {"conv": "norm"}


class Flipped(nn.Module):
    """A weight that is another layer's, which is held where it is no child."""

    def __init__(self, other):
        super().__init__()
        self.other = [other]

    def forward(self, weight):
        return self.other[0].weight.flip(-1)


def test_a_weight_that_a_parametrization_of_another_reads():
    net = Net()
    parametrize.register_parametrization(net.conv2, "weight", Flipped(net.conv1), unsafe=True)
    assert net.conv1 in DataFlow(net).read


def test_forwards_that_ask_for_the_grad_mode():
    class Asking(Net):
        def forward(self, x):
            y = self.conv1(x)
            return (self.norm1(y), y) if self.ask() else self.norm1(y)

    for ask in (torch.is_grad_enabled, torch.is_inference_mode_enabled):
        Asking.ask = staticmethod(ask)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                assert DataFlow(Asking()).pairs == {}


# ---------------------------------------------------------------------- what wraps what it calls


def test_activation_checkpointing():
    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(lambda z: self.norm1(self.conv1(z)), x, use_reentrant=False)
            return checkpoint_sequential(nn.Sequential(self.conv2, self.norm2), 1, x, use_reentrant=True)

    assert pairs(Checkpointed()) == {"conv1": "norm1", "conv2": "norm2"}


def test_compiled_modules():
    net = nn.Sequential(torch.compile(block()), nn.DataParallel(block()))
    assert pairs(net) == {"0._orig_mod.0": "0._orig_mod.1", "1.module.0": "1.module.1"}
    net[1].compile()
    assert len(pairs(net)) == 2


# ---------------------------------------------------------------------- looking changes nothing


def test_looking_leaves_the_model_as_it_was():
    class Busy(Net):
        def __init__(self):
            super().__init__()
            self.calls, self.log = 0, []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.log.append(x)
            self.count.add_(1)
            self.last = x
            return self.norm1(self.conv1(x)) + torch.ones(3)

    net = Busy().train()
    net.norm2.eval()
    state, attributes = copy.deepcopy(net.state_dict()), set(vars(net))
    assert pairs(net) == {"conv1": "norm1"}
    assert (net.calls, net.log, set(vars(net))) == (0, [], attributes)
    assert (net.training, net.norm1.training, net.norm2.training) == (True, True, False)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


def test_looking_calls_no_eval_of_the_users():
    class Merging(Net):
        """Adds to its weight on the way to evaluation, as adapters do."""

        def train(self, mode=True):
            if not mode:
                self.conv1.weight.data.add_(1)
            return super().train(mode)

        def forward(self, x):
            return self.norm1(self.conv1(x)) if not self.training else x

    net = Merging()
    weight = net.conv1.weight.detach().clone()
    assert pairs(net) == {"conv1": "norm1"}
    assert torch.equal(net.conv1.weight, weight)


def test_random_chains_agree_with_a_reference():
    """Random sequences of convolutions, norms and activations: exactly the neighbours are pairs."""
    rng = random.Random(0)
    for _ in range(30):
        kinds = [rng.choice("cna") for _ in range(rng.randint(1, 9))]
        make = {"c": lambda: nn.Conv2d(1, 1, 1), "n": lambda: nn.BatchNorm2d(1), "a": nn.ReLU}
        net = nn.Sequential(*(make[kind]() for kind in kinds))
        expected = {str(i): str(i + 1) for i in range(len(kinds) - 1) if kinds[i : i + 2] == ["c", "n"]}
        assert pairs(net) == expected
