"""The originals take the places that our method would take. The stand-ins are written by the tests."""

import sys

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.bench.config import BenchConfig
from foldconv.lab.bench.measure import measure
from foldconv.lab.bench.reference import locate, swap


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
    given = BenchConfig(tiny, (2,), (16,), ("doconv", "orepa", "dbb"), ("step", "eval"), 1, reference=str(root))
    report = measure(given)
    for result in report["results"]:
        assert {"doconv (original)", "dbb (original)"} <= result["ratios"].keys()
        assert "orepa (original)" not in result["ratios"]
    assert report["notes"] == ["no original of orepa: expected a clone with the file clones/OREPA_CVPR2022/blocks.py"]
    assert set(report["references"]) == {"doconv", "dbb"}
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
