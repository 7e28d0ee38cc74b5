"""The project's own measurements: the authors' layers take our layers' places, the floor is that of the weights.

Stand-ins for the clones of the original repositories are written by the tests.
"""

import collections
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.bench.config import BenchConfig
from foldconv.lab.bench.report import table

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    cpu, gpu, training_step = map(importlib.import_module, ("cpu", "gpu", "training_step"))
    from floor import Floor
    from originals import locate, swap

DO_CONV = """
from torch._six import container_abcs
import torch
from torch import nn

class DOConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, D_mul=None, stride=1, padding=0, dilation=1, groups=1,
                 bias=True, padding_mode="zeros"):
        super().__init__()
        assert isinstance(kernel_size, container_abcs.Iterable)
        self.inner = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)

    def forward(self, x):
        return self.inner(x)
"""
SIBLING = """
from torch import nn

class Base(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 nonlinear=None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return self.bn(self.conv(x))
"""
OREPA = "from helpers import Base\n" + "".join(
    f"class {name}(Base): pass\n" for name in ("OREPA", "OREPA_1x1", "OREPA_LargeConv")
)
# The same name for another file: clones must not see each other's.
DBB = "from helpers import Other\nclass DiverseBranchBlock(Other): pass\n"

Clone = collections.namedtuple("Clone", "folder files")
CLONES = {
    "doconv": Clone("DO-Conv", {"do_conv_pytorch.py": DO_CONV}),
    "orepa": Clone("OREPA_CVPR2022", {"blocks.py": OREPA, "helpers.py": SIBLING}),
    "dbb": Clone("DiverseBranchBlock", {"diversebranchblock.py": DBB, "helpers.py": SIBLING.replace("Base", "Other")}),
}


@pytest.fixture
def clones(tmp_path):
    """``clones("doconv", ...)``: a folder with stand-ins for the original repositories."""

    def make(*methods):
        root = tmp_path / "clones"
        root.mkdir()
        for clone in (CLONES[method] for method in methods):
            (root / clone.folder).mkdir()
            for name, text in clone.files.items():
                (root / clone.folder / name).write_text(text, encoding="utf-8")
        return root

    return make


def originals(root, *methods):
    return locate(str(root), list(methods))[0]


def kinds(network):
    return [type(module).__name__ for module in network]


def test_do_conv_takes_the_place_of_what_ours_expands(tiny, clones):
    plain = zoo.create(tiny)
    path = originals(clones("doconv"), "doconv")["doconv"]
    network, counts = swap(plain, foldconv.DOConv(), path)
    assert counts == {"DOConv2d": 3}
    changed = [i for i, (a, b) in enumerate(zip(kinds(plain), kinds(network))) if a != b]
    assert changed == [0, 6, 9]  # the 1x1 at 3 stays
    assert network[9].inner.groups == 8
    assert network[0].inner.stride == (2, 2)
    assert "DOConv2d" not in kinds(plain)


def test_blocks_with_a_norm_take_the_norms_place_too(tiny, clones):
    path = originals(clones("orepa"), "orepa")["orepa"]
    network, counts = swap(zoo.create(tiny), foldconv.OREPA(), path)
    assert kinds(network)[:8] == [
        "OREPA_LargeConv", "Identity", "ReLU", "OREPA_1x1", "Identity", "ReLU", "OREPA", "Identity"
    ]  # fmt: skip
    assert counts == {"OREPA_LargeConv": 1, "OREPA_1x1": 1, "OREPA": 1, "Conv2d": 1}  # no norm follows the last
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 5)


def test_clones_do_not_see_each_others_files(tiny, clones):
    paths = originals(clones("orepa", "dbb"), "orepa", "dbb")
    for method, name in ((foldconv.OREPA(), "OREPA"), (foldconv.DBB(), "DiverseBranchBlock")):
        assert name in swap(zoo.create(tiny), method, paths[method.name])[1]
    assert "helpers" not in sys.modules
    assert "torch._six" not in sys.modules
    assert not list(paths["dbb"].parent.glob("__pycache__"))


def test_originals_run_in_the_same_rounds(tiny, clones):
    root = clones("doconv", "dbb")
    given = BenchConfig(tiny, (2,), (16,), ("doconv", "orepa", "dbb"), ("step", "eval"), 1)
    report = training_step.run(given, str(root))
    for result in report["results"]:
        assert {"doconv (original)", "dbb (original)"} <= result["ratios"].keys()
        assert "orepa (original)" not in result["ratios"]
    assert report["notes"] == ["no original of orepa: expected a clone with the file clones/OREPA_CVPR2022/blocks.py"]
    assert set(report["references"]) == {"doconv", "dbb"}
    assert report["command"].endswith("--steps 1 --reference clones")
    assert report["contestants"]["dbb (original)"]["layers"]["DiverseBranchBlock"] == 2


def test_a_folder_without_any_is_an_error(tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"holds no original of doconv, repvgg; expected DO-Conv/do_conv_pytorch"
    ):
        locate(str(tmp_path), ["doconv", "repvgg"])


def test_a_file_that_does_not_import_is_named(tiny, clones):
    path = originals(clones("doconv"), "doconv")["doconv"]
    path.write_text("import nothing_of_this_name")
    with pytest.raises(UnsupportedError, match=r"do_conv_pytorch.py: cannot be imported \(ModuleNotFoundError: "):
        swap(zoo.create(tiny), foldconv.DOConv(), path)
    path.write_text("")
    with pytest.raises(UnsupportedError, match=r"no layer in the place of 0, Conv2d\(.*AttributeError"):
        swap(zoo.create(tiny), foldconv.DOConv(), path)


def test_the_floor_is_that_of_the_weights_with_a_d(tiny):
    report = training_step.run(BenchConfig(tiny, (2,), (16,), ("dbb", "doconv"), steps=2))
    (step,) = report["results"]
    weights = 3 * 32 * 49 + 8 * 8 * 9 + 8 * 9  # 7x7, 3x3 and depthwise 3x3; the 1x1 has no D
    assert step["floor"]["bytes"] == 4 * weights
    copies, plain = step["floor"]["copy_seconds"], step["seconds"]["plain"]
    assert step["seconds"][Floor.NAME] == [a + 2.5 * b for a, b in zip(plain, copies, strict=True)]
    assert step["ratios"][Floor.NAME]["median"] > 1
    assert Floor.COPY not in step["seconds"] | step["medians"] | step["ratios"]
    assert Floor.NAME in table(report)
    (step,) = training_step.run(BenchConfig(tiny, (2,), (16,), ("dbb",), steps=1))["results"]
    assert "floor" not in step


def test_the_script_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "a.json"
    small = ["digits_resnet", "--batch", "2", "--size", "8", "--steps", "1", "--methods", "doconv", "--out", str(out)]
    assert training_step.main(small) == 0
    report = json.loads(out.read_text())
    assert report["command"].startswith("python benchmarks/training_step.py digits_resnet --batch 2 --size 8 ")
    assert capsys.readouterr().out == f"{table(report)}\n"
    assert training_step.main([*small, "--reference", str(tmp_path)]).endswith(" (dbb)")
    assert "unknown architecture" in training_step.main(["digits_resent"])


# ---------------------------------------------------------------------- all at once


def test_cpu_writes_every_case_beside_what_was_there(tmp_path, capsys, monkeypatch):
    tiny = {
        "resnet18": BenchConfig("digits_resnet", (2, 3), (8,), ("doconv",), ("step",), 2),
        "fold": BenchConfig("digits_resnet", (2,), (8,), ("doconv",), ("fold", "kept"), 1),
    }
    monkeypatch.setattr(cpu, "CASES", tiny)
    monkeypatch.setattr(cpu, "RESNET", "digits_resnet")
    monkeypatch.setattr(cpu, "REACH", {("fold", "digits_resnet", 2, 8, "doconv"): 1e-9})
    files = ["--out", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    assert cpu.main(["--only", "fold", *files]) == 0
    assert not (tmp_path / "a.png").exists()
    assert cpu.main(["--only", "resnet18", "--rounds", "1", *files]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert [(r["case"], r["what"]) for r in report["results"]] == [
        *[("resnet18", "step")] * 2, ("fold", "fold"), ("fold", "kept")
    ]  # fmt: skip
    assert all(len(values) == 1 for values in report["results"][0]["seconds"].values())
    assert set(report["commands"]) == set(tiny)
    assert " --clock cpu" in report["commands"]["fold"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| training step | digits_resnet 3×8² | doconv | ") for line in printed)
    assert any("| fold, checked | digits_resnet | doconv | " in line and "(not yet)" in line for line in printed)
    with pytest.raises(SystemExit):
        cpu.main(["--only", "flod", *files])
    assert "did you mean 'fold'?" in capsys.readouterr().err


def test_what_should_be_reached_is_measured():
    measured = {
        (what, config.network, batch, size)
        for config in cpu.CASES.values()
        for what in config.what
        for batch, size in config.cases
    }
    assert {row[:4] for row in cpu.REACH} <= measured
    place = gpu.Place()
    assert {row[1:] for row in gpu.REACH} <= set(place.cases)
    assert {row[0] for row in gpu.REACH} <= {method for method, path in place.contestants}


def test_gpu_runs_dry(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--rounds", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["dry"]
    assert {row["network"] for row in report["steps"]} == {"squeezenet1_1"}
    assert [row["amp"] for row in report["steps"]] == [False, True]
    assert "orepa, a compiled layer: off by" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_that_there_is_none(tmp_path):
    assert "torch finds no GPU" in gpu.main(["--out", str(tmp_path / "gpu.json")])
    assert not list(tmp_path.iterdir())
