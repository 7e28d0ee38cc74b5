"""The original's goldens: same function in both modes, same gradients, same logits."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import foldconv
from foldconv import CheckpointError, UnsupportedError

GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens"
BLOCKS = sorted(path.stem for path in GOLDENS.glob("doconv_*.safetensors"))
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def golden(name):
    path = GOLDENS / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        arguments = json.loads(file.metadata()["arguments"])
    tensors = load_file(path)
    state = {key[6:]: value for key, value in tensors.items() if key.startswith("state.")}
    arguments.pop("D_mul", None)
    return nn.Conv2d(**arguments, dtype=torch.float64), state, tensors


def imported(tmp_path, conv, state):
    torch.save(state, tmp_path / "block.pth")
    return foldconv.import_checkpoint(tmp_path / "block.pth", conv, source="do-conv")


def test_all_goldens_are_here():
    assert len(BLOCKS) == 6


@pytest.mark.parametrize("name", BLOCKS)
def test_function_and_gradients_are_the_originals(tmp_path, name):
    conv, state, tensors = golden(name)
    layer = imported(tmp_path, conv, state)
    x = tensors["input"].double().requires_grad_()
    torch.testing.assert_close(layer.eval()(x), tensors["output_eval"], **CLOSE)
    output = layer.train()(x)
    torch.testing.assert_close(output, tensors["output_train"], **CLOSE)
    (output * tensors["probe"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["grad.input"], **CLOSE)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, tensors["grad.bias"], **CLOSE)
    if name == "doconv_group2":
        return  # imported folded: its parameters are others, see the next test
    if not isinstance(layer, foldconv.DOConv2d):
        torch.testing.assert_close(layer.weight.grad.flatten(2), tensors["grad.W"], **CLOSE)
        return
    ours = layer.weight.grad.flatten(2)
    if layer.weight_extra is not None:
        ours = torch.cat([ours, layer.weight_extra.grad], dim=2)
    torch.testing.assert_close(ours, tensors["grad.W"], **CLOSE)
    torch.testing.assert_close(layer.D.grad, tensors["grad.D"], **CLOSE)


def test_parameters_come_through_bit_for_bit(tmp_path):
    conv, state, _ = golden("doconv_3x3")
    layer = imported(tmp_path, conv, state)
    assert torch.equal(layer.weight.float().flatten(2), state["W"])
    assert torch.equal(layer.D.float(), state["D"])


@pytest.mark.parametrize("multiplier", [18, 30])
def test_more_than_twice_the_taps_is_exact_too(tmp_path, multiplier):
    """The original's identity is repeated there, and its sum with D has more digits than a float32."""
    D = 0.1 * torch.randn(3, 9, multiplier)
    W = torch.randn(4, 3, multiplier)
    diagonal = torch.eye(9).repeat(1, multiplier // 9)
    diagonal = nn.functional.pad(diagonal, (0, multiplier % 9)).expand(D.shape)
    kernel = torch.einsum("ois,iks->oik", W.double(), D.double() + diagonal.double()).reshape(4, 3, 3, 3)
    state = {"W": W, "D": D, "d_diag": diagonal}
    layer = imported(tmp_path, nn.Conv2d(3, 4, 3, bias=False, dtype=torch.float64), state)
    torch.testing.assert_close(layer.kernel(), kernel, rtol=1e-13, atol=1e-13)
    layer = imported(
        tmp_path, nn.Conv2d(3, 4, 3, bias=False), {f"module.{name}": value for name, value in state.items()}
    )
    torch.testing.assert_close(layer.kernel(), kernel.float(), rtol=1e-4, atol=1e-5)


def test_groups_keep_the_originals_function_which_is_not_the_papers(tmp_path):
    conv, state, tensors = golden("doconv_group2")
    layer = imported(tmp_path, conv, state)
    assert layer.D.abs().max() == 0
    paper = foldconv.DOConv2d(4, 8, 3, padding=1, groups=2, dtype=torch.float64)
    with torch.no_grad():
        paper.weight.copy_(state["W"].reshape(paper.weight.shape))
        paper.D.copy_(state["D"])
        paper.bias.copy_(state["bias"])
    assert (paper(tensors["input"].double()) - tensors["output_eval"]).abs().max() > 0.1


def test_one_tap_is_a_plain_convolution(tmp_path):
    conv, state, _ = golden("doconv_1x1")
    assert type(imported(tmp_path, conv, state)) is nn.Conv2d


def demo():
    """The demo's network with the original's module names."""
    convs = [nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((1, 16), (16, 16), (16, 10))]
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def test_the_demo_network_gives_its_logits_and_folds(tmp_path):
    expected = load_file(GOLDENS / "net_doconv_mnist.safetensors")
    net = foldconv.import_checkpoint(GOLDENS / "net_doconv_mnist.pth", demo(), source="do-conv")
    assert [type(net[i]) for i in (0, 2, 4)] == [foldconv.DOConv2d] * 3
    x = expected["input"].double()
    torch.testing.assert_close(net(x), expected["logits"], **CLOSE)
    torch.testing.assert_close(foldconv.fold(net)(x), expected["logits"], **CLOSE)


@pytest.mark.parametrize("form", ["module.", "D_diag", "state_dict", "model", "safetensors", "renamed", "trained"])
def test_forms_in_which_checkpoints_come(tmp_path, form):
    state = torch.load(GOLDENS / "net_doconv_mnist.pth", weights_only=True)
    path = tmp_path / "net.pth"
    if form == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    if form == "D_diag":
        state = {key.replace("d_diag", "D_diag"): value for key, value in state.items()}
    if form == "trained":  # what nobody trains is left out
        state = {key: value for key, value in state.items() if not key.endswith("d_diag")}
    if form in ("state_dict", "model"):
        state = {form: state, "epoch": 3}
    if form in ("safetensors", "renamed"):
        path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pth")
        save_file(state, path)
    else:
        torch.save(state, path)
    expected = load_file(GOLDENS / "net_doconv_mnist.safetensors")
    net = foldconv.import_checkpoint(path, demo(), source="do-conv")
    torch.testing.assert_close(net(expected["input"].double()), expected["logits"], **CLOSE)


# ---------------------------------------------------------------------- bad input


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch hostile",)


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def renamed(old, new):
    return lambda state: {k.replace(old, new): v for k, v in state.items()}


def shaped(key, *shape):
    return lambda state: {**state, key: torch.zeros(shape)}


BROKEN = {
    r"holds a DO-Conv layer '9', but Sequential has no module there": renamed("4.", "9."),
    r"holds a DO-Conv layer '1', but Sequential has ReLU there": renamed("4.", "1."),
    r"1 missing: 0.bias; nothing was loaded": without("0.bias"),
    r"1 surplus: extra; nothing was loaded": shaped("extra", 1),
    r"1 misshapen: 0.bias \(expected \(16,\), received \(3,\)\)": shaped("0.bias", 3),
    r"2: has D but neither d_diag nor D_diag": without("2.d_diag"),
    r"2: expected W \(16, 16, 9\) and D \(16, 9, 9\) .* received \(16, 16, 9\) and \(16, 9, 8\)": shaped(
        "2.D", 16, 9, 8
    ),
    r"0: expected W of 144 values for a kernel \(16, 1, 3, 3\)": lambda s: without("0.D")(shaped("0.W", 16, 1, 8)(s)),
    r"0: has W of 9 taps but no D; is the checkpoint complete": without("0.D"),
    r"2: expected d_diag \(16, 9, 9\), received \(1, 9, 9\)": shaped("2.d_diag", 1, 9, 9),
    r"'2.W': expected floating point values, received int64": lambda s: {**s, "2.W": s["2.W"].long()},
    r"'2.D': expected floating point values, received complex64": lambda s: {**s, "2.D": s["2.D"] + 0j},
    r"'2.bias': expected a tensor, received list": lambda s: {**s, "2.bias": s["2.bias"].tolist()},
    r"no key ends in '.W'": lambda s: {"0.weight": torch.zeros(1)},
    r"expected a dictionary of tensors, found dict without any": lambda s: {"epoch": 1},
    r"expected a dictionary of tensors, found list": lambda s: [1],
    r"refused, since reading it would run code": lambda s: {"state_dict": s, "hook": Hostile()},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_checkpoint_that_does_not_fit_says_why_and_changes_nothing(tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    state = torch.load(GOLDENS / "net_doconv_mnist.pth", weights_only=True)
    torch.save(BROKEN[message](state), tmp_path / "net.pth")
    net = demo()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        foldconv.import_checkpoint(tmp_path / "net.pth", net, source="do-conv")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert not (tmp_path / "hostile").exists()


@pytest.mark.parametrize("length", [0, 10, 5000])
def test_a_truncated_file(tmp_path, length):
    whole = (GOLDENS / "net_doconv_mnist.pth").read_bytes()
    (tmp_path / "net.pth").write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"net.pth: "):
        foldconv.import_checkpoint(tmp_path / "net.pth", demo(), source="do-conv")


def test_a_missing_file_and_an_unknown_source(tmp_path):
    with pytest.raises(CheckpointError, match=r"none.pth: no such file"):
        foldconv.import_checkpoint(tmp_path / "none.pth", demo(), source="do-conv")
    with pytest.raises(UnsupportedError, match=r"unknown checkpoint source 'doconv'; did you mean 'do-conv'\?"):
        foldconv.import_checkpoint(tmp_path / "none.pth", demo(), source="doconv")


def test_a_file_of_far_too_many_tensors_is_refused_before_it_is_read(tmp_path, monkeypatch):
    def read(path):
        raise AssertionError("read")

    monkeypatch.setattr("foldconv.files.originals.read_content", read)
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        for number in range(2000):
            archive.writestr(f"net/data/{number}", b"")
    with pytest.raises(CheckpointError, match=r"holds 2,000 records, far more than Conv2d with 1 tensors could take"):
        foldconv.import_checkpoint(tmp_path / "net.pth", nn.Conv2d(1, 1, 3, bias=False), source="do-conv")
