"""`convert-weights`: the pairs, what has to be said, and errors in one line."""

import json
import os

import pytest
import torch
from torch import nn

import foldconv
from foldconv.files.convert._params import read_params
from foldconv.lab.train import open_network


@pytest.fixture
def files(tmp_path):
    """A doconv checkpoint, and a template of the plain network in Gluon's format."""
    from foldconv.files.convert._params import write_params

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2))
    rich = foldconv.expand(net, "doconv")
    nn.init.normal_(rich[0].D)
    foldconv.save(rich, tmp_path / "rich.safetensors")
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "fc.weight": (2, 4), "fc.bias": (2,)}
    shapes |= {f"norm.{name}": (4,) for name in ("gamma", "beta", "running_mean", "running_var")}
    write_params(tmp_path / "made.params", {name: torch.zeros(shape).numpy() for name, shape in shapes.items()})
    return tmp_path, rich


def test_a_doconv_checkpoint_becomes_a_plain_one_of_gluon(call, call_json, files):
    folder, rich = files
    arguments = [
        "convert-weights",
        folder / "rich.safetensors",
        folder / "out.params",
        "--like",
        folder / "made.params",
    ]
    code, out, err = call(*arguments)
    assert code == 0
    assert "took the tensors at its top (10 tensors)" in err
    assert "  0  →  conv\n" in out
    assert "0 → conv: folded, since the target is a plain convolution" in out
    written = read_params(folder / "out.params")
    assert abs(written["conv.weight"] - rich[0].fold().weight.detach().numpy()).max() < 1e-6
    os.remove(folder / "out.params")
    found = call_json(*arguments)
    assert found["layers"] == {"conv": "0", "fc": "3", "norm": "1"}
    assert found["out"] == str(folder / "out.params")


def test_eps_names_and_the_file_that_exists(call_json, fails, files):
    folder, _ = files
    template = ["--like", folder / "made.params"]
    out = folder / "out.params"
    (folder / "map.json").write_text(json.dumps({"0": "conv"}))
    for names in (["0=conv", "1=norm"], [folder / "map.json"]):
        arguments = ["convert-weights", folder / "rich.safetensors", out, *template, "--target-eps", "0.1"]
        assert call_json(*arguments, "--names", *names)["layers"]["conv"] == "0"
        assert read_params(out)["norm.gamma"] == pytest.approx(1.1**0.5, rel=1e-4)
        assert "is not overwritten; choose another name" in fails(*arguments)
        os.remove(out)
    arguments = ["convert-weights", folder / "rich.safetensors", out, *template]
    assert "names: the target" in fails(*arguments, "--names", "0=0")
    assert "--names none.json: expected SOURCE=TARGET, or a file" in fails(*arguments, "--names", "none.json")
    expected = "expected LAYER=HxWxC or LAYER=no, received 'fc=3x'"
    assert expected in fails(*arguments, "--flatten", "fc=3x", code=2)
    assert "out.keras: a file of keras, but like=" in fails(*arguments[:2], folder / "out.keras", *template)
    assert not out.exists()


def test_a_runs_checkpoint_says_which_network_it_holds(call_json, run_folder, tmp_path):
    network, _ = open_network(run_folder / "last.ckpt")
    plain = foldconv.fold(network)
    foldconv.save(plain, tmp_path / "made.safetensors")
    torch.save(plain.state_dict(), tmp_path / "made.pth")
    call_json("convert-weights", run_folder / "last.ckpt", tmp_path / "out.pth", "--like", tmp_path / "made.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-6)
