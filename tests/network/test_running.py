"""What a run on example inputs proves where tracing cannot, and each way in which an output goes elsewhere."""

import collections
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import foldconv
from foldconv.network.dataflow import DataFlow

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions and two norms for one test's own forward, which asks for a number, so no trace ends."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.drop, self.same = nn.Dropout(0.5), nn.Identity()

    def forward(self, x):
        assert float(x.detach().sum()) < 1e9
        return self.run(x)


def made(run):
    return type("Net", (Net,), {"run": run})()


def flow(model, inputs=X, training=True):
    return DataFlow(model, inputs, training=training)


def pairs(model, inputs=X, training=True):
    """The proven pairs by name."""
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    return {names[conv]: names[norm] for conv, norm in flow(model, inputs, training).pairs.items()}


# ---------------------------------------------------------------------- what a run proves


def crossed(self, x):
    return self.norm2(self.conv1(F.relu(self.norm1(self.conv2(x)))))


def by_data(self, x):
    return self.norm1(self.conv1(x)) if float(x.sum()) > -1e9 else x


def asks_what_is_no_use(self, x):
    y = self.conv1(x)
    if not isinstance(y, torch.Tensor) or y.dim() != 4 or y.shape[1] != 4 or y.dtype != self.conv1.weight.dtype:
        return y
    return self.norm1(y)


def in_an_object(self, x):
    Output = collections.namedtuple("Output", "logits")
    return Output(self.norm1(self.conv1(x)))


def checkpointed(self, x):
    y = checkpoint(lambda z: self.norm1(self.conv1(z)), x, use_reentrant=True)
    return checkpoint(lambda z: self.norm2(self.conv2(z)), y, use_reentrant=False)


def even(x):
    if x.shape[-1] % 2:
        x = F.pad(x, (0, 1))
    missing = max(4 - x.shape[-2], 0)
    return F.pad(x, (0, 0, 0, missing))


def is_wide(x):
    return x.shape[-1] > x.shape[-2]


def sizes_that_decide_nothing(self, x):
    x = even(x)
    b, c, h, w = x.shape
    if h % 2 or w < 2:
        raise ValueError("odd")
    assert c == 4
    assert b == x.size(0), "the same"
    y = self.norm1(self.conv1(x.view(b, -1, h, w)))
    return F.interpolate(y, (h * 2, round(w / 2))) + torch.zeros(y.shape[0], 1, 2 * y.shape[2], 3)


def checkpointed_between(self, x):
    y = checkpoint(self.norm1, self.conv1(x), use_reentrant=True)
    return checkpoint(self.norm2, self.conv2(y), use_reentrant=False)


def asks_for_gradients(self, x):
    """A gradient within the forward, which writes to its input and leaves torch first."""
    x *= x.detach().numpy().max()
    y = self.norm1(self.conv1(x))
    with torch.enable_grad():
        scale = torch.ones((), requires_grad=True)
        return torch.autograd.grad((scale * y.detach().clone()).sum(), scale)[0] + y


def twice(self, x):
    return self.norm1(self.conv1(x)) + self.norm1(self.conv1(x + 1))


def identity_between(self, x):
    return self.norm1(self.same(self.conv1(x)))


BOTH = {"conv1": "norm1", "conv2": "norm2"}
PROVEN = {
    crossed: {"conv1": "norm2", "conv2": "norm1"},
    by_data: {"conv1": "norm1"},
    asks_what_is_no_use: {"conv1": "norm1"},
    in_an_object: {"conv1": "norm1"},
    checkpointed: BOTH,
    sizes_that_decide_nothing: {"conv1": "norm1"},
    checkpointed_between: BOTH,
    asks_for_gradients: {"conv1": "norm1"},
    twice: {"conv1": "norm1"},
    identity_between: {"conv1": "norm1"},
}


@pytest.mark.parametrize("run", PROVEN, ids=lambda f: f.__name__)
def test_proven_by_a_run_only(run):
    net = made(run)
    assert pairs(net) == PROVEN[run]
    assert DataFlow(net).pairs == {}


def test_dropout_between_is_nothing_in_evaluation_mode():
    net = made(lambda self, x: self.norm1(self.drop(self.conv1(x))))
    assert pairs(net) == {}
    assert pairs(net, training=False) == {"conv1": "norm1"}


# ---------------------------------------------------------------------- what it refutes


def added(self, x):
    y = self.conv1(x)
    return self.norm1(y) + y


def viewed(self, x):
    y = self.conv1(x)
    flat = y.flatten(1)
    return self.norm1(y), flat.shape


def sliced(self, x):
    y = self.conv1(x)
    self.norm1(y)
    return y[:, :1]


def written_to(self, x):
    y = self.conv1(x)
    y[:, 0] = 0
    return self.norm1(y)


def written_to_in_place(self, x):
    return self.norm1(F.relu_(self.conv1(x)))


def kept(self, x):
    self.seen = [{"y": self.conv1(x)}]
    return self.norm1(self.seen[0]["y"])


def returned(self, x):
    y = self.conv1(x)
    return {"y": y, "z": self.norm1(y)}


def returned_in_an_object(self, x):
    @dataclasses.dataclass
    class Output:
        y: torch.Tensor
        z: torch.Tensor

    y = self.conv1(x)
    return Output(y, self.norm1(y))


def to_numpy(self, x):
    y = self.conv1(x)
    return self.norm1(y), y.numpy().sum()


def as_number(self, x):
    y = self.conv1(x)
    return self.norm1(y) * float(y.sum())


def two_norms(self, x):
    y = self.conv1(x)
    return self.norm1(y) + self.norm2(y)


def twice_the_same_norm(self, x):
    y = self.conv1(x)
    return self.norm1(y) + self.norm1(y)


def fed_by_two(self, x):
    return self.norm1(self.conv1(x)) + self.norm1(self.conv2(x))


def fed_by_others(self, x):
    return self.norm1(self.conv1(x)) + self.norm1(x)


def weight_read(self, x):
    return self.norm1(self.conv1(x)) * self.conv1.weight.sum()


def weight_read_by_parameters(self, x):
    return self.norm1(self.conv1(x)) * sum(p.square().sum() for p in self.parameters())


def statistics_read(self, x):
    return self.norm1(self.conv1(x)) - self.norm1.running_mean.sum()


def forward_called_directly(self, x):
    return self.norm1(self.conv1.forward(x))


def norms_forward_called_directly(self, x):
    return self.norm1.forward(self.conv1(x))


def by_keyword(self, x):
    return self.norm1(input=self.conv1(x))


def only_in_training(self, x):
    y = self.conv1(x)
    return (self.norm1(y), y) if self.training else self.norm1(y)


def no_norm_in_training(self, x):
    y = self.conv1(x)
    return y.relu() if self.training else self.norm1(y)


def only_with_gradients(self, x):
    y = self.conv1(x)
    return (self.norm1(y), y) if torch.is_grad_enabled() else self.norm1(y)


def only_in_inference_mode(self, x):
    y = self.conv1(x)
    return (self.norm1(y), y) if torch.is_inference_mode_enabled() else self.norm1(y)


def only_for_adversaries(self, x):
    y = self.conv1(x)
    return self.norm1(y) + y if x.requires_grad else self.norm1(y)


def adds_if_large(self, x):
    y = self.conv1(x)
    return self.norm1(y) + y if int(y.shape[-1]) > 10 else self.norm1(y)


def adds_if_wide(self, x):
    y = self.conv1(x)
    return self.norm1(y) + (y if x.size(-1) / x.size(2) > 1 else 0)


def adds_if_told(self, x):
    y = self.conv1(x)
    return self.norm1(y) + y if is_wide(x) else self.norm1(y)


def never(self, x):
    return x


ELSEWHERE = {
    added: "its output is read by add in the root",
    viewed: "its output is read by flatten in the root",
    sliced: "its output is read by __getitem__ in the root",
    written_to: "its output is read by __setitem__ in the root",
    written_to_in_place: "its output is read by relu_ in the root",
    kept: "its output is read by whoever keeps it or gets the model's output",
    returned: "its output is read by whoever keeps it or gets the model's output",
    returned_in_an_object: "its output is read by whoever keeps it or gets the model's output",
    to_numpy: "its output is read by numpy in the root",
    as_number: "its output is read by sum in the root",
    two_norms: "its output goes to 2 batch norm modules",
    twice_the_same_norm: "its output goes to 2 batch norm modules",
    fed_by_two: "norm1 alone reads its output; but of norm1, it is also called with other inputs",
    fed_by_others: "norm1 alone reads its output; but of norm1, it is also called with other inputs",
    weight_read: "the model reads its tensors outside of it",
    weight_read_by_parameters: "the model reads its tensors outside of it",
    statistics_read: "norm1 alone reads its output; but of norm1, the model reads its tensors outside of it",
    forward_called_directly: "the model reads its tensors outside of it",
    norms_forward_called_directly: "its output is read by batch_norm in the root",
    by_keyword: "its output is read by batch_norm in norm1",
    only_in_training: "its output is read by whoever keeps it or gets the model's output",
    no_norm_in_training: "its output is read by relu in the root",
    only_with_gradients: "its output is read by whoever keeps it or gets the model's output",
    only_in_inference_mode: "its output is read by whoever keeps it or gets the model's output",
    only_for_adversaries: "its output is read by add in the root",
    adds_if_large: "the root, through which its output goes, asks for sizes",
    adds_if_wide: "the root, through which its output goes, asks for sizes",
    adds_if_told: "the root, through which its output goes, asks for sizes",
    never: "it is not called on example_inputs",
}


@pytest.mark.parametrize("run", ELSEWHERE, ids=lambda f: f.__name__)
def test_not_proven(run):
    net = made(run)
    seen = flow(net)
    assert seen.pairs == {}
    assert seen.why(net.conv1) == ELSEWHERE[run]


def test_whose_questions_about_sizes_matter():
    class Inner(nn.Module):
        def __init__(self, *parts, ask):
            super().__init__()
            self.parts, self.ask = nn.ModuleList(parts), ask

        def forward(self, x):
            for part in self.parts:
                x = part(x)
            self.size = int(x.shape[-1]) if self.ask else None
            return x

    class Root(Inner):
        def forward(self, x):
            assert float(x.detach().sum()) < 1e9
            return super().forward(x)

    counting = made(lambda self, x: self.norm1(self.conv1(x)) if len(x) < 3 else self.conv1(x))
    assert "asks for sizes" in flow(counting).why(counting.conv1)

    def net(*ask):
        conv, norm = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        return Root(nn.Conv2d(4, 4, 1), Inner(Inner(conv, ask=ask[0]), Inner(norm, ask=ask[1]), ask=ask[2]), ask=ask[3])

    pair = {"parts.1.parts.0.parts.0": "parts.1.parts.1.parts.0"}
    assert pairs(net(False, False, False, True)) == pair
    for number in range(3):
        asking = [number == each for each in range(4)]
        assert pairs(net(*asking)) == {}


def test_what_only_training_shows_is_nothing_to_a_fold():
    assert pairs(made(only_in_training), training=False) == {"conv1": "norm1"}


def test_a_norm_that_may_take_its_turn():
    class Switchable(Net):
        which = 0

        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

        def run(self, x):
            return self.norms[self.which](self.conv1(x))

    net = Switchable()
    net.norm1 = net.norm2 = nn.Identity()  # conv2 remains, which is called by nothing either
    why = "norms.0 alone reads its output; but of norms.0, norms.1 stands beside it and is called by nothing"
    assert flow(net).pairs == {}
    assert flow(net).why(net.conv1).startswith(why)


def test_hooks_see_what_passes():
    net = made(lambda self, x: self.norm1(self.same(self.conv1(x))))
    seen = []
    net.same.register_forward_hook(lambda module, args, output: seen.append(output))
    assert flow(net).why(net.conv1) == "its output is read by same, which has hooks"
    assert seen == [], "hooks of the user's do not run"


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_code_that_calls_no_function_of_torchs():
    def doubled(x):
        return x * 2

    double = torch.jit.script(nn.Tanh())
    for other in (torch.jit.trace(doubled, X), Doubled.apply, double, torch.ops.aten.neg.default):

        def run(self, x, other=other):
            y = self.conv1(x)
            return self.norm1(y) + other(y)

        net = made(run)
        assert "its output is read by" in flow(net).why(net.conv1)
        net.same = double
        assert "its output is read by" in flow(net).why(net.conv1)


# ---------------------------------------------------------------------- the model, and what it is given


def test_a_run_leaves_no_trace():
    class Busy(Net):
        def __init__(self):
            super().__init__()
            self.plain, self.log = torch.ones(1), []

        def run(self, x):
            x.mul_(2)
            self.plain.add_(1)
            self.log.append(x)
            self.conv1.weight.data.add_(torch.rand(1))
            return self.norm1(self.drop(self.conv1(x)))

        def train(self, mode=True):
            raise AssertionError("the user's own train() is called")

    net, x = Busy(), X.clone()
    net.norm2.training = False
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    flow(net, x)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert (net.plain.item(), net.log) == (1.0, [])
    assert (net.training, net.norm1.training, net.norm2.training) == (True, True, False)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), random)


def test_inputs():
    class Two(Net):
        def forward(self, x, *, scale):
            assert float(x.sum()) < 1e9
            return self.norm1(self.conv1(x)) * scale

    class List(Net):
        def forward(self, images):
            return self.norm1(self.conv1(torch.stack(images)))

    assert pairs(Two(), {"x": X, "scale": 2}) == {"conv1": "norm1"}
    assert pairs(List(), (list(X),)) == {"conv1": "norm1"}
    computed = (X.requires_grad_() * 1).clone()
    X.requires_grad_(False)
    assert pairs(made(by_data), computed) == {"conv1": "norm1"}
    refused = (
        "example_inputs: Two fails on them in evaluation mode (TypeError: test_inputs.<locals>.Two.forward() missing 1 "
        "required keyword-only argument: 'scale'); give what its forward takes, in batches of at least two"
    )
    with pytest.raises(foldconv.UnsupportedError) as error:
        flow(Two())
    assert str(error.value) == refused
    with pytest.raises(foldconv.UnsupportedError, match=r"fails on them in training mode \(ValueError: Expected more"):
        flow(made(lambda self, x: self.norm1(self.conv1(x))), torch.randn(1, 4, 1, 1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_expanded_and_folded_by_running():
    torch.manual_seed(0)
    for run in (crossed, checkpointed, twice):
        net = made(run).double()
        x = X.double()
        with pytest.raises(foldconv.NoMatchError, match="with example_inputs= the model also runs"):
            foldconv.expand(net, "repvgg")
        rich = foldconv.expand(net, "repvgg", example_inputs=x)
        optimizer = torch.optim.SGD(rich.parameters(), lr=0.05)
        for _ in range(2):
            rich(x).square().mean().backward()
            optimizer.step()
        plain = foldconv.fold(rich.eval())
        assert plain.state_dict().keys() == net.state_dict().keys()
        torch.testing.assert_close(plain(x), rich(x), rtol=1e-10, atol=1e-10)
        bare = foldconv.fold(plain, batchnorm=True, example_inputs=x)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in bare.modules()) == 2 - len(PROVEN[run])
        torch.testing.assert_close(bare(x), rich(x), rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------- who gets the model


class Loss:
    def __init__(self, model):
        self.device = next(model.parameters()).device


class Penalty:
    def __init__(self, model):
        self.weights = list(model.parameters())


class OtherLoss(Loss):
    pass


def by_choice_of_losses(self):
    kind = Loss if self.training else OtherLoss
    return kind(self)


def by_choice_of_one_that_reads(self):
    kind = Loss if self.training else Penalty
    return kind(self)


def by_second_choice(self):
    kind = Loss
    if self.training:
        kind = Penalty
    return kind(self)


def by_loop(self):
    return [kind(self) for kind in (Loss, Loss)]


def by_argument(self, kind=Loss):
    return kind(self)


def by_import(self):
    from collections import Counter as Loss

    return Loss(self)


def by_another_of_this_name(self):
    X = Penalty
    return X(self)


def by_what_makes_it(self):
    kind = type(Loss(3))
    return kind(self)


class Judged(Net):
    def run(self, x):
        if self.drop is None:
            self.criterion()
        return self.norm1(self.conv1(x))


def test_who_gets_the_model_and_asks_for_no_weights():
    """As YOLO's segmentation chooses its loss by a name of its own."""
    assert pairs(type("Judged", (Judged,), {"criterion": by_choice_of_losses})()) == {"conv1": "norm1"}


@pytest.mark.parametrize(
    "criterion",
    [
        *(by_choice_of_one_that_reads, by_second_choice, by_loop, by_argument, by_import),
        *(by_another_of_this_name, by_what_makes_it),
    ],
)
def test_who_gets_the_model_and_may_read_it(criterion):
    assert pairs(type("Judged", (Judged,), {"criterion": criterion})()) == {}
