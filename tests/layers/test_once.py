"""`composed_once`: the plain network's cost inside, refused where it would lie; nothing is kept outside."""

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import foldconv
from foldconv import DOConv2d, UnsupportedError, composed_once
from foldconv.algebra import Scale, Sum, kernel_rule
from foldconv.layers import once
from foldconv.testing import randomize

METHODS = foldconv.list_methods()
BRANCHED = ["repvgg", "acnet", "mobileone", "qarepvgg", "dbb", "orepa_vgg"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
IN_FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


class Operations(TorchDispatchMode):
    """What torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def convolutions(net, x):
    with Operations() as seen:
        net(x)
    return seen.names.count("convolution")


def flops(net, x):
    with FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


def window(method):
    """Of a size that the method takes."""
    return {"kernel_size": 7, "padding": 3} if method == "dilated" else {"kernel_size": 3, "padding": 1}


def config(method):
    return foldconv.get_method("dilated")(depthwise_only=False) if method == "dilated" else method


def plain_network(method="repvgg"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, stride=2, bias=False, **window(method)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, groups=2, bias=False, **window(method)), nn.BatchNorm2d(8)),
    )


def network(method="repvgg", dtype=torch.float64):
    """An expanded network in evaluation mode, its parameters and statistics random."""
    net = foldconv.expand(plain_network(method), config(method)).double().eval()
    randomize(net)
    return net.to(dtype)


def layer(method="repvgg", dtype=torch.float64, **conv):
    torch.manual_seed(0)
    arguments = {**window(method), "bias": False, **conv}
    net = (
        foldconv.expand(nn.Sequential(nn.Conv2d(4, 4, **arguments), nn.BatchNorm2d(4)), config(method)).double().eval()
    )
    randomize(net)
    return net.to(dtype)[0]


def block():
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6))
    made = foldconv.FoldableBlock(Sum(branch, nn.Conv2d(4, 6, 1, stride=2))).double().eval()
    randomize(made)
    return made


def image(dtype=torch.float64):
    return torch.randn(2, 4, 9, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


def assert_plain(made, x, tolerance=CLOSE):
    """One convolution runs, and computes what the features compute."""
    with torch.no_grad(), composed_once(made):
        assert convolutions(made, x) == 1
        torch.testing.assert_close(made(x), made.feature_forward(x), **tolerance)


def assert_as_outside(made, x):
    """Inside, what runs is what runs outside, operation for operation."""
    with torch.no_grad(), composed_once(made):
        with Operations() as inside:
            received = made(x)
    with torch.no_grad(), Operations() as outside:
        expected = made(x)
    assert torch.equal(received, expected)
    assert inside.names == outside.names
    assert inside.names.count("convolution") > 1


# ---------------------------------------------------------------------- the plain network's cost


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_the_plain_networks_cost(method, context):
    net, x = network(method), image()
    folded = foldconv.fold(net, check=False)
    with context():
        outside = net(x)
        with composed_once(net) as same:
            assert same is net
            outputs = [net(x) for _ in range(3)]
            found = convolutions(net, x), flops(net, x)
        for y in outputs:
            torch.testing.assert_close(y, outside, **CLOSE)
            torch.testing.assert_close(y, folded(x), **CLOSE)
        assert found == (convolutions(folded, x), flops(folded, x))
        assert found[0] == convolutions(plain_network(method).double(), x)
        if method != "dgconv":  # whose closed gates make it cheaper
            assert found[1] == flops(plain_network(method).double(), x)


@pytest.mark.parametrize("method", ["doconv", "orepa", "dbb"])
def test_kernels_are_composed_at_entry_and_never_again(method, monkeypatch):
    net, composed = network(method), []
    for made in (net[0], net[3][0]):
        original = made.to_kernel
        made.to_kernel = lambda dtype, original=original: composed.append(dtype) or original(dtype)
    with torch.no_grad(), composed_once(net):
        assert composed == [torch.float64] * 2
        for _ in range(3):
            net(image())
        assert len(composed) == 2


@pytest.mark.parametrize(
    "conv", [{"stride": 2}, {"padding": "same"}, {"padding": 0}, {"padding_mode": "reflect"}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
def test_geometries(method, conv):
    assert_plain(layer(method, **conv), image())


def test_a_users_block():
    assert_plain(block(), image())


def test_feature_composition():
    assert_plain(layer(foldconv.DOConv(composition="feature")), image())


def test_without_a_batch():
    made, x = layer("doconv"), image()[0]
    with torch.no_grad(), composed_once(made):
        assert convolutions(made, x) == 1
        torch.testing.assert_close(made(x), made.fold()(x), **CLOSE)


@pytest.mark.parametrize("output_size", [None, [18, 16], [17, 15]])
def test_transposed(output_size):
    torch.manual_seed(0)
    made = foldconv.DOConvTranspose2d(4, 6, 3, stride=2, padding=1).double().eval()
    nn.init.normal_(made.D)
    with torch.no_grad():
        expected = made(image(), output_size)
        with composed_once(made):
            assert convolutions(made, image()) == 1
            torch.testing.assert_close(made(image(), output_size=output_size), expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_float32_to_its_rounding(method):
    assert_plain(layer(method, torch.float32), image(torch.float32), IN_FLOAT32)


@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_kernels_are_composed_in_float32_at_least(method, monkeypatch):
    types = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        made = layer(method, dtype)
        original = made.to_kernel
        made.to_kernel = lambda dtype, original=original: types.append(dtype) or original(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), composed_once(made):
            made(image(dtype))
        with torch.no_grad(), composed_once(made):
            assert made(image(dtype)).dtype == dtype
    assert types == [torch.float32, torch.float32, torch.float32, torch.float32, torch.float64, torch.float64]


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    made, x = layer(method, torch.float32), image(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), composed_once(made):
        assert made(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(made(x), made.feature_forward(x), **IN_FLOAT32)


def test_a_body_in_half_precision_with_norms_in_single():
    made = layer(dtype=torch.bfloat16)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    with torch.no_grad(), composed_once(made):
        assert made(image(torch.bfloat16)).dtype == torch.bfloat16
        assert convolutions(made, image(torch.bfloat16)) == 1


@pytest.mark.parametrize("method", ["doconv", "expandnet", "dgconv", "repvgg"])
def test_channels_last(method):
    made = layer(method).to(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), composed_once(made):
        assert made(x).is_contiguous(memory_format=torch.channels_last)
    assert_plain(made, x)


@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_a_frozen_layer_lets_the_input_gradient_through(method):
    made, x = layer(method).requires_grad_(False), image().requires_grad_()
    with torch.inference_mode():
        entered = composed_once(made)
        entered.__enter__()
    y = made(x)
    (received,) = torch.autograd.grad(y.square().sum(), x)
    entered.__exit__(None, None, None)
    (expected,) = torch.autograd.grad(made.feature_forward(x).square().sum(), x)
    torch.testing.assert_close(received, expected, **CLOSE)


def test_hooks_on_the_layer_itself_run():
    made, seen = layer(), []
    made.register_forward_hook(lambda *_: seen.append(1))
    assert_plain(made, image())
    assert seen


def test_a_layer_inside_a_layer():
    torch.manual_seed(0)
    made = foldconv.FoldableBlock(Sum(DOConv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))).double().eval()
    randomize(made)
    assert_plain(made, image())


# ---------------------------------------------------------------------- nothing kept outside


def by_data(made):
    """Mean teachers, ema-pytorch, PEFT's merge."""
    for p in made.parameters():
        p.data.mul_(0.9).add_(torch.full_like(p, 0.1))


def fused(optimizer):
    def step(made):
        for p in made.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer(made.parameters(), lr=0.1, fused=True).step()

    return step


def to_vector_and_back(made):
    vector = nn.utils.parameters_to_vector(made.parameters()).detach()
    nn.utils.vector_to_parameters(vector + 0.1, made.parameters())


def by_another_process(made):
    """The same memory, another tensor."""
    for p in made.parameters():
        torch.empty(0, dtype=p.dtype).set_(p.untyped_storage(), 0, p.shape, p.stride()).add_(0.1)


WRITERS = {
    "data": by_data,
    "SGD(fused=True)": fused(torch.optim.SGD),
    "AdamW(fused=True)": fused(torch.optim.AdamW),
    "vector_to_parameters": to_vector_and_back,
    "shared memory": by_another_process,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("method", METHODS)
def test_what_no_version_counter_sees_is_seen_outside(method, write):
    made, x = layer(method), image()
    for p in made.parameters():
        p.data.share_memory_()
    with torch.no_grad():
        with composed_once(made):
            before = made(x)
        torch.testing.assert_close(made(x), before, **CLOSE)
    write(made)
    with torch.no_grad():
        after = made(x)
        torch.testing.assert_close(after, copy.deepcopy(made).fold()(x), **CLOSE)
        with composed_once(made):
            torch.testing.assert_close(made(x), after, **CLOSE)
    assert (after - before).abs().max() > 1e-3


# ---------------------------------------------------------------------- refused


def conv(made):
    return made.body.main.conv


def norm(made):
    return made.body.point.norm


def refusal(text):
    return pytest.raises(UnsupportedError, match=f"^{text}$")


REMEDY = "and composed_once is for evaluation; call eval\\(\\) first, or leave the context to train"


def test_training_mode_at_entry():
    net = network("doconv")
    net[3][0].train()
    with refusal(rf"3\.0: it is in training mode, {REMEDY}"), composed_once(net):
        raise AssertionError("entered")
    made = layer()
    norm(made).train()
    with refusal(f"the root: its body.point.norm is in training mode, {REMEDY}"), composed_once(made):
        raise AssertionError("entered")
    assert not once._open


@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_training_mode_inside(method):
    net = network(method)
    with torch.no_grad(), composed_once(net):
        net(image())
        net.train()
        with refusal(f"0: it is in training mode, {REMEDY}"):
            net(image())
        net.eval()
        net(image())


def test_a_norm_in_training_mode_inside():
    made = layer()
    with torch.no_grad(), composed_once(made):
        norm(made).train()
        with refusal(f"the root: its body.point.norm is in training mode, {REMEDY}"):
            made(image())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_parameters(method):
    net = network(method)
    with (
        composed_once(net),
        refusal(
            r"0: gradients are recorded for its parameters inside composed_once; use torch\.no_grad\(\), or leave the "
            "context to train"
        ),
    ):
        net(image())


def in_place(find):
    def change(made):
        with torch.no_grad():
            find(made).mul_(1.5)

    return change


def stepped(made):
    for p in made.parameters():
        p.grad = torch.full_like(p, 0.1)
    torch.optim.SGD(made.parameters(), lr=1.0).step()


def a_norm_sees_a_batch(made):
    norm(made).train()(image() + 1)
    norm(made).eval()


WRITTEN = {
    "weight": ("body.main.conv.weight", "repvgg", in_place(lambda made: conv(made).weight)),
    "norm": ("body.point.norm.bias", "repvgg", in_place(lambda made: norm(made).bias)),
    "running_mean": ("body.point.norm.running_mean", "repvgg", in_place(lambda made: norm(made).running_mean)),
    "batch": ("body.point.norm.num_batches_tracked", "repvgg", a_norm_sees_a_batch),
    "buffer": (
        "body.point.norm.running_var",
        "repvgg",
        lambda made: setattr(norm(made), "running_var", norm(made).running_var + 0.1),
    ),
    "D": ("D", "doconv", in_place(lambda made: made.D)),
    "step": ("weight", "doconv", stepped),
    "storage": ("D", "doconv", lambda made: setattr(made.D, "data", made.D.data + 0.1)),
    "parameter": ("D", "doconv", lambda made: setattr(made, "D", nn.Parameter(made.D.detach() + 0.1))),
    "bias": ("bias", "doconv", lambda made: setattr(made, "bias", nn.Parameter(made.D.new_ones(4)))),
    "load_state_dict": (
        "weight",
        "doconv",
        lambda made: made.load_state_dict({k: v + 0.1 for k, v in made.state_dict().items()}),
    ),
}


@pytest.mark.parametrize(("key", "method", "write"), WRITTEN.values(), ids=WRITTEN)
def test_written_to(key, method, write):
    made, x = layer(method), image()
    with torch.no_grad():
        with composed_once(made):
            before = made(x)
            write(made)
            with refusal(
                f"the root: its {key} was written to inside composed_once, after its kernel was composed; leave the "
                "context and enter it again"
            ):
                made(x)
            with composed_once(made):  # which composes anew
                torch.testing.assert_close(made(x), made.feature_forward(x), **CLOSE)
        assert (made(x) - before).abs().max() > 1e-3
        with composed_once(made):
            torch.testing.assert_close(made(x), made.feature_forward(x), **CLOSE)


def test_no_module():
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, received int$"), composed_once(3):
        pass


# ---------------------------------------------------------------------- as outside


def hook(*_):
    return None


WATCHED = {
    "forward hook": lambda made: norm(made).register_forward_hook(hook),
    "forward pre-hook": lambda made: norm(made).register_forward_pre_hook(hook),
    "backward hook": lambda made: norm(made).register_full_backward_hook(hook),
    "backward pre-hook": lambda made: norm(made).register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_where_somebody_looks_at_a_branch(watch):
    made, x = layer(), image()
    handle = watch(made)
    with torch.no_grad(), composed_once(made):
        assert convolutions(made, x) > 1
        handle.remove()
        assert convolutions(made, x) == 1
        handle = watch(made)
        assert convolutions(made, x) > 1


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


STRANGE = [other_forward, parametrized, replica, no_parameter, two_types, not_linear]


@pytest.mark.parametrize("change", STRANGE)
def test_where_the_body_is_not_what_a_kernel_describes(change):
    made = layer()
    change(made)
    assert_as_outside(made, image())


def another_branch(made):
    made.body.add_module("extra", nn.Conv2d(4, 4, 5, padding=2, bias=False).double().eval())


def another_body(made):
    made.body = copy.deepcopy(made.body)
    conv(made).weight.data.mul_(2)


ALTERED = {
    "other_forward": other_forward,
    "another_branch": another_branch,
    "another_body": another_body,
    "eps": lambda made: setattr(norm(made), "eps", 0.5),
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_what_is_altered_inside_runs_as_outside(change):
    made, x = layer(), image()
    with torch.no_grad():
        with composed_once(made):
            before = made(x)
            change(made)
            after = made(x)
        torch.testing.assert_close(after, made(x), **CLOSE)
        assert (after - before).abs().max() > 1e-3


def test_a_subclass_with_a_forward_of_its_own():
    class Doubled(DOConv2d):
        def forward(self, input, output_size=None):
            return 2 * super().forward(input, output_size)

        def to_kernel(self, dtype=torch.float64):
            kernel = super().to_kernel(dtype)
            return kernel.replace(weight=2 * kernel.weight, bias=2 * kernel.bias)

    made, x = Doubled(4, 4, 3).double().eval(), image()
    with torch.no_grad():
        expected = made.fold()(x)
        with composed_once(made):
            torch.testing.assert_close(made(x), expected, **CLOSE)


@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_a_forward_replaced_on_the_layer_itself(method):
    made, x = layer(method), image()
    original = made.forward
    made.forward = lambda input: original(input) * 3
    with torch.no_grad():
        expected = made(x)
        with composed_once(made):
            torch.testing.assert_close(made(x), expected, **CLOSE)
            assert convolutions(made, x) == 1


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        made = layer("doconv")
        with composed_once(made):
            before = made(image())
            made.D.mul_(1.5)
            torch.testing.assert_close(made(image()), made.feature_forward(image()), **CLOSE)
            assert (made(image()) - before).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")  # inside torch's jvp
@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_function_transforms_see_the_parameters(method):
    net, x = network(method), image()
    plain = foldconv.fold(net)
    with composed_once(net):
        torch.testing.assert_close(torch.func.jvp(net, (x,), (x,)), torch.func.jvp(plain, (x,), (x,)), **CLOSE)
        with torch.no_grad():
            torch.testing.assert_close(torch.func.vmap(net)(x[None])[0], plain(x), **CLOSE)
            other = {name: p.detach() * 1.1 for name, p in net.named_parameters()}
            call = torch.func.vmap(lambda p: torch.func.functional_call(net, p, (x,)))
            received = call({name: p[None] for name, p in other.items()})[0]
    torch.testing.assert_close(received, torch.func.functional_call(net, other, (x,)), **CLOSE)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit.trace is deprecated, and still used
def test_tracers_see_the_branches():
    made, x = layer(), image()
    with torch.no_grad(), composed_once(made):
        expected = made(x)
        traced = torch.jit.trace(made, x)
        assert str(traced.inlined_graph).count("aten::batch_norm") == 3
        torch.testing.assert_close(traced(x), expected, **CLOSE)
        graph = fx.symbolic_trace(made)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in graph.modules()) == 3
        torch.testing.assert_close(graph(x), expected, **CLOSE)
        exported = torch.export.export(made, (x,)).module()
        torch.testing.assert_close(exported(x), expected, **CLOSE)
        assert len(list(exported.parameters())) == len(list(made.parameters()))


@pytest.mark.parametrize("method", ["doconv", "repvgg"])
def test_compilers_see_the_parameters(method):
    made, x, graphs = layer(method), image(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(made, fullgraph=True, backend=backend)
        expected = compiled(x)
        with composed_once(made):
            torch.testing.assert_close(compiled(x), expected, **CLOSE)
            torch.testing.assert_close(made(x), expected, **CLOSE)
            for p in made.parameters():
                p.mul_(1.5)
            torch.testing.assert_close(compiled(x), made.feature_forward(x), **CLOSE)
        compiled(x)
    assert len(graphs) == 1, "the context is no reason to compile again"
    torch.compiler.reset()


# ---------------------------------------------------------------------- nothing left


def test_nothing_is_left_after_an_exception():
    net = network("dbb")
    with contextlib.suppress(ZeroDivisionError), torch.no_grad(), composed_once(net):
        net(image())
        raise ZeroDivisionError
    assert not once._open
    with torch.no_grad():
        assert convolutions(net, image()) > 2


def test_nested_and_not_in_order():
    net, x = network("dbb"), image()
    plain = 2
    with torch.no_grad():
        first, second = composed_once(net), composed_once(net[3])
        first.__enter__()
        second.__enter__()
        assert convolutions(net, x) == plain
        first.__exit__(None, None, None)
        assert plain < convolutions(net, x)
        assert convolutions(net[3], torch.zeros(1, 8, 9, 9).double()) == 1
        second.__exit__(None, None, None)
        assert convolutions(net[3], torch.zeros(1, 8, 9, 9).double()) > 1
    assert not once._open


def test_other_threads_and_other_networks():
    net, other, found = network("dbb"), network("dbb"), []

    def look():
        with torch.no_grad():
            found.extend([convolutions(net, image()), convolutions(other, image())])

    with composed_once(net):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert found[0] == 2
    assert found[1] > 2


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "torch.save": lambda made: (
        torch.save(made, file := io.BytesIO()),
        file.seek(0),
        torch.load(file, weights_only=False),
    )[2],
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("method", ["doconv", "expandnet", "repvgg"])
def test_copies_carry_nothing(method, duplicate):
    made, x = layer(method), image()
    attributes, keys = set(vars(made)), list(made.state_dict())
    with torch.no_grad():
        size = len(pickle.dumps(made))
        with composed_once(made):
            expected = made(x)
            assert (set(vars(made)), list(made.state_dict()), len(pickle.dumps(made))) == (attributes, keys, size)
            twin = duplicate(made)
            with Operations() as seen:
                torch.testing.assert_close(twin(x), expected, **CLOSE)
            assert seen.names != ["convolution"]
            torch.testing.assert_close(made(x), expected, **CLOSE)


def test_folding_inside():
    net, x = network("dbb"), image()
    with torch.no_grad(), composed_once(net):
        torch.testing.assert_close(foldconv.fold(net)(x), net(x), **CLOSE)
        foldconv.fold(net, inplace=True)
        assert convolutions(net, x) == 2


def test_as_a_decorator_of_an_evaluation_loop():
    net = network("doconv")

    @composed_once(net)
    def evaluate():
        return [net(image()) for _ in range(2)]

    with torch.no_grad():
        for y in (*evaluate(), *evaluate()):
            torch.testing.assert_close(y, net(image()), **CLOSE)
