"""What is run, how often, and what is written down; nothing here depends on how long anything takes."""

import copy
import json
import time
from collections import Counter

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.bench import loop
from foldconv.lab.bench.config import BenchConfig
from foldconv.lab.bench.contestants import AGAIN, PLAIN, Contestant, build
from foldconv.lab.bench.measure import WARM_UP, _Case, measure
from foldconv.lab.bench.memory import kept_bytes, step_peak
from foldconv.lab.bench.report import table
from foldconv.layers import ComposedConv, Foldable
from foldconv.methods.doconv import _DOConvNd


def config(tiny, **given):
    return BenchConfig(tiny, **{"batch": (2,), "size": (16,), "methods": ("doconv", "dbb"), "steps": 2} | given)


def result(report, what):
    (found,) = [result for result in report["results"] if result["what"] == what]
    return found


@pytest.fixture(scope="module")
def report(tiny):
    """Read only."""
    return measure(config(tiny, what=("step", "eval", "fold", "memory", "kept")))


def test_a_report_says_where_with_what_and_how(report):
    assert set(report["machine"]) == {"processor", "cores", "threads", "gpu", "system"}
    assert report["machine"]["threads"] == 1
    assert report["versions"]["foldconv"] == foldconv.__version__
    assert report["versions"].keys() >= {"python", "torch", "torchvision"}
    assert report["arguments"]["methods"] == ["doconv", "dbb"]
    assert report["command"].startswith("foldconv bench tiny --batch 2 --size 16 --methods doconv,dbb ")
    assert report["contestants"]["doconv"]["layers"] == {"DOConv2d": 3}
    assert sum(report["contestants"]["doconv"]["paths"].values()) == 3
    assert json.loads(json.dumps(report)) == report


def test_every_contestant_has_a_sample_per_round_and_the_ratios_are_theirs(report):
    for what, names in (
        ("step", [PLAIN, AGAIN, "doconv", "dbb"]),
        ("eval", [PLAIN, AGAIN, "doconv", "doconv (folded)", "dbb", "dbb (folded)"]),
    ):
        found = result(report, what)
        assert list(found["seconds"]) == names
        assert all(len(samples) == 2 and min(samples) > 0 for samples in found["seconds"].values())
        pairs = zip(found["seconds"]["dbb"], found["seconds"][PLAIN])
        assert found["ratios"]["dbb"]["median"] == pytest.approx(sum(a / b for a, b in pairs) / 2)
    assert set(result(report, "fold")["seconds"]) == {"doconv", "dbb"}


def test_folded_networks_have_the_plain_modules(report):
    assert result(report, "eval")["folded_has_the_plain_modules"] == {"doconv": True, "dbb": True}


def test_guests_take_part_and_their_calls_are_timed_in_the_rounds_of_steps(tiny):
    calls = []

    def guests(field):
        assert [c.name for c in field] == [PLAIN, AGAIN, "doconv"]
        return [Contestant("guest", copy.deepcopy(field[0].network))], {"call": lambda: calls.append(1)}

    report = measure(config(tiny, methods=("doconv",), what=("step", "eval")), guests=guests)
    assert list(result(report, "step")["ratios"]) == [PLAIN, AGAIN, "doconv", "guest", "call"]
    assert list(result(report, "eval")["ratios"]) == [PLAIN, AGAIN, "doconv", "doconv (folded)", "guest"]
    assert len(calls) == WARM_UP + 2
    assert "guest" in report["contestants"]


def test_memory_counts_what_is_held_and_what_a_step_adds(report):
    found = result(report, "memory")["bytes"]
    plain = zoo.create("tiny")
    parameters = 4 * sum(p.numel() for p in plain.parameters())
    buffers = sum(b.numel() * b.element_size() for b in plain.buffers())
    assert found[PLAIN]["held"] == 2 * parameters + buffers  # momentum is as large as the parameters
    assert found[PLAIN]["peak"] > parameters  # gradients, and activations
    assert found[AGAIN] == found[PLAIN]
    assert found["dbb"]["peak"] > found[PLAIN]["peak"]


def test_bytes_kept_are_those_of_the_graph_each_storage_once(report):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 5, 5)
    # The input, what the convolution gave, what ReLU made; statistics of four channels, the batch's and running ones.
    assert kept_bytes(lambda: net(x), net) == 4 * (x.numel() + 2 * (2 * 4 * 25) + 4 * 4)
    assert kept_bytes(lambda: x @ x.mT, net) == 0
    found = result(report, "kept")
    assert found["bytes"][AGAIN] == found["bytes"][PLAIN] < found["bytes"]["dbb"]
    assert found["ratios"]["dbb"]["median"] == found["bytes"]["dbb"] / found["bytes"][PLAIN]


def test_the_loop_is_compared_with_a_bare_one_step_by_step(monkeypatch):
    steps, step = Counter(), torch.optim.SGD.step
    monkeypatch.setattr(loop, "IMAGES", 5)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: steps.update(["step"]) or step(*a, **k))
    network = zoo.create("digits_resnet")
    before = copy.deepcopy(network.state_dict())
    given = BenchConfig("digits_resnet", (2,), (8,), ("doconv",), ("loop",), steps=1)
    found = loop.epochs(given, network, 2, (1, 8, 8), 10, 3, lambda run: [steps.clear(), run(), steps["step"]][2])
    assert found == {"bare loop": [2] * 3, "foldconv train": [2] * 3}  # here its steps are what counts
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    report = measure(given)
    assert set(result(report, "loop")["ratios"]) == {"bare loop", "foldconv train"}
    assert "foldconv train" in table(report)


def test_the_processs_own_time_is_that_of_one_thread(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(time, "process_time", lambda: seen.append(torch.get_num_threads()) or len(seen))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        report = measure(config(tiny, methods=("doconv",), clock="cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
    assert result(report, "step")["seconds"] == {name: [1, 1] for name in (PLAIN, AGAIN, "doconv")}
    assert "CPU time of one thread" in table(report)


@pytest.mark.parametrize("path", ["torch", "cpu"])
def test_memory_sees_the_composed_kernels_on_every_path(path, monkeypatch):
    def wide():
        layers = [torch.nn.Conv2d(3, 64, 1), torch.nn.Conv2d(64, 256, 3)]
        return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    if path == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setitem(zoo._registry._BUILDERS, "wide", wide)
    report = measure(BenchConfig("wide", (1,), (3,), ("doconv",), ("memory",), 1, (path,)))
    found = result(report, "memory")["bytes"]
    name = f"doconv ({path})"
    assert report["contestants"][name]["paths"] == {path: 1}
    kernel = 4 * wide()[1].weight.numel()
    assert found[name]["peak"] >= found[PLAIN]["peak"] + kernel


def test_memory_of_a_step_includes_its_gradients_however_often_it_ran(capfd):
    network = torch.nn.Linear(500, 500)

    def step():
        network.zero_grad()
        network(torch.ones(1, 500)).sum().backward()

    for _ in range(2):
        assert 4 * 500 * 501 <= step_peak(step, network, "cpu") < 2 * 4 * 500 * 501
    assert capfd.readouterr().err == ""


def test_what_is_called_folded_is(tiny, monkeypatch):
    run, original = {}, _Case._forward

    def watched(self, contestant, network):
        run[id(network)] = sum(isinstance(module, Foldable) for module in network.modules())
        return original(self, contestant, network)

    monkeypatch.setattr(_Case, "_forward", watched)
    measure(config(tiny, what=("eval",)))
    assert list(run.values()) == [0, 0, 3, 0, 3, 0]


def test_each_step_is_one_forward_and_one_backward_of_every_contestant(tiny, monkeypatch):
    calls = Counter()
    original = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: calls.update(["backward"]) or original(*a, **k))
    measure(config(tiny, steps=3))
    assert calls["backward"] == 4 * (WARM_UP + 3)


def test_a_step_changes_the_weights(tiny):
    found = result(measure(config(tiny, methods=("doconv",), steps=6)), "step")
    fresh = result(measure(config(tiny, methods=("doconv",), steps=1)), "step")
    assert found["last_loss"][PLAIN] < fresh["last_loss"][PLAIN]
    assert found["last_loss"][AGAIN] == found["last_loss"][PLAIN]


def test_an_expanded_network_composes_each_kernel_once_per_step(tiny, monkeypatch):
    composed = Counter()
    original = _DOConvNd.kernel
    monkeypatch.setattr(_DOConvNd, "kernel", lambda self: composed.update([self]) or original(self))
    network = foldconv.expand(zoo.create(tiny), "doconv")
    layers = [m for m in network.modules() if isinstance(m, ComposedConv)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for steps in (1, 2):
        optimizer.zero_grad()
        network(torch.randn(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
        assert composed == dict.fromkeys(layers, steps)  # backward composes nothing again


def test_paths_and_compositions_are_contestants_where_they_differ(tiny):
    given = config(tiny, methods=("doconv", "dbb"), path=("auto", "torch"), composition=("kernel", "feature"))
    contestants = build(given)
    found = {c.name: c for c in contestants}
    assert [c.name for c in contestants] == [PLAIN, AGAIN, "doconv", "doconv (torch)", "doconv (feature)", "dbb"]
    assert found["doconv (feature)"].method == foldconv.DOConv(composition="feature")
    assert found["doconv (torch)"].describe()["paths"] == {"torch": 3}
    assert found["doconv"].network is not found["doconv (torch)"].network


def test_methods_take_options(tiny):
    given = config(tiny, methods=("doconv:depth_multiplier=64", "orepa:large=plain:point=false"))
    methods = [c.method for c in build(given)[2:]]
    assert methods == [foldconv.DOConv(64), foldconv.OREPA("plain", point=False)]


def test_channels_last_and_amp_reach_the_networks(monkeypatch):
    seen = []

    class Watched(torch.nn.Conv2d):
        def forward(self, x):
            output = super().forward(x)
            if self.weight.is_contiguous(memory_format=torch.channels_last):
                seen.append((x.is_contiguous(memory_format=torch.channels_last), output.dtype, self.training))
            return output

    def watched():
        layers = [Watched(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
        return torch.nn.Sequential(*layers)

    monkeypatch.setitem(zoo._registry._BUILDERS, "watched", watched)
    measure(BenchConfig("watched", (2,), (8,), ("doconv",), ("step", "eval"), 1, channels_last=True, amp=True))
    precise = (True, torch.float32, False)  # once, to count the classes
    assert seen.count(precise) == 1
    assert {found for found in seen if found != precise} == {
        (True, torch.bfloat16, True),
        (True, torch.bfloat16, False),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": "resnet81"}, "unknown architecture 'resnet81'"),
        ({"methods": ("docnv",)}, "unknown method 'docnv'; did you mean 'doconv'?"),
        ({"methods": ("doconv:depth=9",)}, "method 'doconv': unknown option 'depth'"),
        ({"methods": ("doconv:9",)}, "methods: expected NAME:KEY=VALUE, received 'doconv:9'"),
        ({"path": ("gpu",)}, "path 'gpu' cannot be taken: "),
        ({"methods": ("dbb",), "composition": ("feature",)}, "none of dbb has the choice of feature"),
        ({"size": (1,)}, "tiny: does not take images of shape"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, given, message):
    network = given.pop("network", tiny)
    with pytest.raises(UnsupportedError, match=message):
        measure(config(network, **given))


def test_only_classifiers_are_measured(monkeypatch):
    monkeypatch.setitem(zoo._registry._BUILDERS, "maps", lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    with pytest.raises(UnsupportedError, match="maps: expected a classifier whose output is one tensor"):
        measure(config("maps"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(tiny):
    with pytest.raises(UnsupportedError, match="torch finds no GPU; use --device cpu"):
        measure(config(tiny, device="cuda"))


def test_the_table_names_every_contestant_and_case(report):
    text = table(report)
    for words in ("tiny 2×16", "plain again", "dbb (folded)", "held", "1 threads", "folding"):
        assert words in text
    evaluation = result(report, "eval") | {"folded_has_the_plain_modules": {"doconv": True, "dbb": False}}
    assert "folded to other modules than the plain network's: dbb" in table(report | {"results": [evaluation]})
