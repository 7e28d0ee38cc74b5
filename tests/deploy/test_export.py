import json
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import foldconv
from foldconv.deploy import export as exporting
from foldconv.deploy.formats import FORMATS, Format
from foldconv.deploy.running import call, furthest, run_file
from foldconv.errors import CheckpointError, FoldMismatchError, UnsupportedError

X = torch.randn(2, 3, 8, 8)


def network():
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_an_expanded_network_in_training_mode_is_written_as_it_evaluates(tmp_path):
    net = network().train()
    net(X)
    rich = foldconv.expand(net, "repvgg")
    flags = [module.training for module in rich.modules()]
    path = tmp_path / "net.pt2"
    exported = foldconv.export(rich, path, X, labels=["cat", "dog"], preprocessing={"mean": [0.5] * 3})
    assert exported.error < 1e-5
    assert exported.format == "torch.export"
    assert "within" in str(exported)
    assert [module.training for module in rich.modules()] == flags
    program = torch.export.load(path)
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert sorted(os.listdir(tmp_path)) == ["net.json", "net.pt2"]
    description = json.loads((tmp_path / "net.json").read_text())
    assert description["labels"] == ["cat", "dog"]
    assert description["inputs"][0]["shape"] == [None, 3, 8, 8]
    # Any batch, in a process that has never seen the network.
    x = torch.randn(5, 3, 8, 8)
    (found,) = run_file(FORMATS[".pt2"].runtime, path, [[x.numpy()]])
    assert np.abs(found[0] - rich.eval()(x).detach().numpy()).max() < 1e-5
    with pytest.raises(FileExistsError):
        foldconv.export(rich, path, X)


@pytest.mark.parametrize(("suffix", "beside"), [(".pt2", ".json"), (".xml", ".bin"), (".param", ".bin")])
def test_names_of_files_beside_are_refused_before_the_work(tmp_path, suffix, beside, monkeypatch):
    (tmp_path / f"net{beside}").write_text("precious")
    monkeypatch.setattr(exporting, "deployable", None)  # nothing is folded
    monkeypatch.setattr(Format, "expect_packages", lambda self: None)
    with pytest.raises(FileExistsError, match=rf"belongs to net{suffix} and exists.*net{beside}"):
        foldconv.export(network(), tmp_path / f"net{suffix}", X)
    assert os.listdir(tmp_path) == [f"net{beside}"]


def test_a_file_that_computes_something_else_is_not_left_there(tmp_path, monkeypatch):
    program = exporting.traced

    def wrong(network, batch, *options):
        with torch.no_grad():
            network[0].weight[0] *= 1.001
        return program(network, batch, *options)

    monkeypatch.setattr(exporting, "traced", wrong)
    with pytest.raises(FoldMismatchError, match=r"does not compute what .* nothing was left there"):
        foldconv.export(network(), tmp_path / "net.pt2", X, dynamic_batch=False)
    assert os.listdir(tmp_path) == []


class Asks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x, *, other):
        return {"first": self.first(x), "others": [self.second(other), self.first(other)]}


def test_keywords_and_nested_outputs(tmp_path):
    net = Two()
    foldconv.export(net, tmp_path / "net.pt2", {"x": X, "other": X + 1})
    x, other = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    (found,) = run_file(FORMATS[".pt2"].runtime, tmp_path / "net.pt2", [[x.numpy(), other.numpy()]])
    expected = net(x, other=other)
    for ours, theirs in zip([expected["first"], *expected["others"]], found, strict=True):
        assert np.abs(ours.detach().numpy() - theirs).max() < 1e-5


@pytest.mark.parametrize(
    ("net", "inputs", "options", "message"),
    [
        (network(), X * float("nan"), {}, "example_inputs: the network's outputs on them hold NaN or infinity"),
        (nn.Conv2d(3, 4, 3), X[0], {}, "example_inputs: fails for a batch of 1: RuntimeError: .*; the first dimension"),
        (nn.Conv2d(3, 4, 3, device="meta"), X, {}, "weight: is on the meta device and has no values"),
        (network(), X, {"labels": ["cat"]}, "labels: expected 2 names, one for each class, received 1"),
        (network(), X, {"preprocessing": {"mean": X}}, "preprocessing: expected values that JSON knows"),
        (network(), (), {}, "example_inputs: expected a tensor"),
        (network(), (X, 1), {}, "example_inputs: expected tensors .* received int"),
        (
            nn.Sequential(nn.Sequential(Asks())),
            X,
            {},
            r"torch.export cannot write this network: 0.0 \(Asks\): .*[Dd]ata-dep",
        ),
    ],
    ids=["NaN", "unbatched", "meta", "labels", "preprocessing", "nothing", "number", "control flow"],
)
def test_refused_in_one_line(tmp_path, net, inputs, options, message):
    with pytest.raises(UnsupportedError, match=message) as error:
        foldconv.export(net, tmp_path / "net.pt2", inputs, **options)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


class Answers(nn.Module):
    """Numbers, whether they are above zero, and which is the largest, in a type that holds no negative one."""

    def forward(self, x):
        x = x.mean((2, 3))
        return x, x > 0, x.argmax(1).to(torch.uint8)


def test_answers_that_are_no_numbers_with_a_fraction(tmp_path):
    assert foldconv.export(Answers(), tmp_path / "net.pt2", X, dynamic_batch=False).error < 1e-5
    assert furthest([[np.array([True, False])]], [[np.array([True, True])]])[0] == 1
    assert furthest([[np.array([3], np.uint8)]], [[np.array([4], np.uint8)]])[0] == 1 / 3


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_a_network_that_draws_numbers_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="computes something else from the same inputs each time"):
        foldconv.export(Draws(), tmp_path / "net.pt2", X)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("labels", ["cd", 2])
def test_labels_are_a_list(tmp_path, labels):
    with pytest.raises(TypeError, match="labels: expected a list of names, one for each class, received"):
        foldconv.export(network(), tmp_path / "net.pt2", X, labels=labels)
    with pytest.raises(TypeError, match="dynamic_batch: expected True or False, received 'no'"):
        foldconv.export(network(), tmp_path / "net.pt2", X, dynamic_batch="no")
    assert os.listdir(tmp_path) == []


def test_what_a_runtime_cannot_do_is_refused_by_the_layers_name(tmp_path, monkeypatch):
    monkeypatch.setattr("foldconv.deploy.formats.Format.expect_packages", lambda self: None)
    net = nn.Sequential(nn.Conv3d(1, 2, 3))
    with pytest.raises(UnsupportedError, match="0: three dimensions: ExecuTorch converts it, and what it wrote fails"):
        foldconv.export(net, tmp_path / "net.pte", torch.randn(1, 1, 5, 5, 5))


def test_a_runtime_that_dies_or_fails_is_told_in_one_line(tmp_path):
    runtime = tmp_path / "sick.py"
    runtime.write_text("import os, signal\ndef run(path, batches):\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(UnsupportedError, match="sick: the process of run was killed by SIGKILL"):
        run_file(runtime, "net", [[np.zeros(1)]])
    runtime.write_text("def run(path, batches):\n    raise ValueError('no such operator')\n")
    with pytest.raises(UnsupportedError, match="sick: run failed: ValueError: no such operator"):
        run_file(runtime, "net", [[np.zeros(1)]])
    # What a runtime tells its maker of those who use it, it does not tell here.
    runtime.write_text(
        "import os\ndef run(path, batches):\n    raise ValueError(os.environ['CI'] + os.environ['NNCF_CI'])\n"
    )
    with pytest.raises(UnsupportedError, match="ValueError: true1"):
        run_file(runtime, "net", [[np.zeros(1)]])
    with pytest.raises(UnsupportedError, match="sick: write failed"):
        call(runtime, "write", "a", "b", python=(sys.executable,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_widths_are_written_in_32_bits(tmp_path, dtype):
    net = network().eval().to(dtype)
    exported = foldconv.export(net, tmp_path / "net.pt2", X.to(dtype), dynamic_batch=False)
    assert exported.error < 1e-5
    assert next(net.parameters()).dtype == dtype
    program = torch.export.load(tmp_path / "net.pt2")
    assert {value.dtype for value in program.state_dict.values()} == {torch.float32}


def test_a_description_of_something_else_is_refused(tmp_path):
    path = tmp_path / "net.pt2"
    foldconv.export(network(), path, X, dynamic_batch=False, check=False)
    beside = tmp_path / "net.json"
    known = json.loads(beside.read_text())
    for inputs in (None, [], ["x"], [{"shape": "x"}], [{"shape": []}], [{"shape": [1e9]}], [{"shape": [2**40]}]):
        beside.write_text(json.dumps(known | {"inputs": inputs}))
        with pytest.raises(CheckpointError, match="expected a file of foldconv's export"):
            exporting.runner(path)
    beside.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"net.json: expected a description"):
        exporting.runner(path)


def test_a_failure_from_c_is_told_without_where_in_c(tmp_path):
    runtime = tmp_path / "runtime.py"
    lines = ["no such operator", "Exception raised from run at a.cpp:1 (most recent call first):", "frame #0: f + 0x1"]
    runtime.write_text(f"def run(model, batches): raise RuntimeError({chr(10).join(lines)!r})")
    np.savez(tmp_path / "given.npz", **{"0/0": np.zeros(1)})
    with pytest.raises(UnsupportedError, match=r"^runtime: run failed: RuntimeError: no such operator$"):
        call(runtime, "run", "model", str(tmp_path / "given.npz"), str(tmp_path / "result.npz"))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_file_tells_nothing_of_the_source_code_that_it_came_from(tmp_path, suffix):
    for package in FORMATS[suffix].packages:
        pytest.importorskip(package)
    path = tmp_path / f"net{suffix}"
    foldconv.export(network(), path, X)
    content = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = b"".join(map(archive.read, archive.namelist()))
    assert len(content) > 1000
    assert b".py" not in content
