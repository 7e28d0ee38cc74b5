"""MXNet's files without MXNet; tests/gluon/test_convert.py reads and writes the same with it."""

import struct

import numpy as np
import pytest
import torch
from torch import nn

import foldconv
from foldconv.errors import CheckpointError, UnsupportedError
from foldconv.files.convert._params import read_params, write_params

from . import write_gluon


def test_the_fixture_is_what_the_script_writes(tmp_path):
    write_gluon.write(tmp_path)
    for name in ("convert_gluon.params", "convert_gluon.npz"):
        load = np.load if name.endswith("npz") else read_params
        committed, written = load(write_gluon.FIXTURES / name), load(tmp_path / name)
        assert list(committed) == list(written)
        for key in committed:
            np.testing.assert_allclose(committed[key], written[key], rtol=1e-5, atol=1e-5)


def test_from_gluon_and_back(tmp_path):
    source = write_gluon.FIXTURES / "convert_gluon.params"
    net = nn.Sequential(
        foldconv.DOConv2d(3, 8, 3, bias=False, depth_multiplier=12),
        nn.BatchNorm2d(8, eps=0.1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2),
        nn.Linear(800, 5),
    )
    foldconv.convert_weights(source, net)
    assert net[0].D.abs().max() > 0.1
    foldconv.convert_weights(net, tmp_path / "back.params", like=source)
    before, after = read_params(source), read_params(tmp_path / "back.params")
    assert list(before) == list(after)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["conv0_{}", "arg:net_conv0_{}", "features.0.{}"])
def test_names_of_every_way_to_save(form, tmp_path):
    conv, more = nn.Sequential(foldconv.DOConv2d(3, 4, 3, depth_multiplier=10)), {}
    torch.nn.init.normal_(conv[0].D)
    for name, tensor in conv[0].state_dict().items():
        more[form.format(name)] = np.zeros(tensor.shape, "float32")
    write_params(tmp_path / "made.params", more)
    found = foldconv.convert_weights(conv, tmp_path / "out.params", like=tmp_path / "made.params").layers
    assert list(found) == [form.removeprefix("arg:")[:-3]]
    written = read_params(tmp_path / "out.params")
    for name, tensor in conv[0].state_dict().items():
        assert np.array_equal(written[form.format(name)], tensor.numpy())


def damaged(content, tmp_path):
    path = tmp_path / "damaged.params"
    path.write_bytes(content)
    return path


def test_damaged_files_say_so(tmp_path):
    write_params(tmp_path / "good.params", {"a.weight": np.ones((2, 3), "float32")})
    good = (tmp_path / "good.params").read_bytes()
    for end in range(len(good)):
        with pytest.raises(CheckpointError, match=r"damaged.params"):
            read_params(damaged(good[:end], tmp_path))
    for content, message in {
        b"x" * 100: "not an MXNet .params file",
        good + b"x": "1 arrays, 1 names and 1 bytes more",
        good[:28] + b"\1" + good[29:]: "an array is sparse",
        good[:24] + b"\xc8" + good[25:]: "of an older format .0xf993fac8.",
        good[:60] + b"\xff" + good[61:]: "has the unknown type 255",
        good[:8] + b"\0" * 8 + b"\xff" * 8 + good[24:]: "damaged.params: an array is|announced",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            read_params(damaged(content, tmp_path))
    with pytest.raises(CheckpointError, match="MXNet has no complex64; expected one of float32"):
        write_params(tmp_path / "new.params", {"a": np.ones(1, "complex64")})
    with pytest.raises(FileExistsError):
        write_params(tmp_path / "good.params", {})
    assert (tmp_path / "good.params").read_bytes() == good


def test_unknown_names_are_refused(tmp_path):
    write_params(tmp_path / "odd.params", {"0.alpha": np.ones(1, "float32")})
    with pytest.raises(
        UnsupportedError, match=r"0.alpha: no rule to convert it; expected names ending in weight_extra"
    ):
        foldconv.convert_weights(tmp_path / "odd.params", nn.Sequential(nn.Linear(1, 1)))


def test_arrays_of_shapes_that_no_layer_has_are_refused(tmp_path):
    one, kernel = np.ones(4, "float32"), np.ones((4, 3, 3, 3), "float32")
    norm = {f"1.{name}": one for name in ("gamma", "beta", "running_mean", "running_var")}
    target = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    wrong = [
        {"1.running_mean": np.ones((), "float32")},
        {"1.gamma": one[:2]},
        {"0.D": one},
        {"0.D": np.ones((3, 9, 2))},
    ]
    for number, arrays in enumerate(wrong):
        write_params(tmp_path / f"{number}.params", {"0.weight": kernel, **norm, **arrays})
        with pytest.raises(CheckpointError, match=r"^[01]: a (norm|kernel) cannot have arrays of the shapes"):
            foldconv.convert_weights(tmp_path / f"{number}.params", target)
    write_params(tmp_path / "good.params", {"0.weight": kernel, **norm})
    empty = struct.pack("<2q", 0, 1 << 62).join((tmp_path / "good.params").read_bytes().split(struct.pack("<2q", 4, 3)))
    (tmp_path / "empty.params").write_bytes(empty)
    with pytest.raises(CheckpointError, match=r"an array has the shape \(0, 4611686018427387904, 3, 3\)"):
        foldconv.convert_weights(tmp_path / "empty.params", target)
