"""OREPA's goldens: all kinds of block, a network, and what has to be imported composed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import foldconv
from foldconv import OREPA, CheckpointError
from foldconv.files.originals._blocks import renamed
from foldconv.files.originals.orepa import BLOCKS
from foldconv.lab.zoo.orepa_resnet import OREPAResNet
from foldconv.lab.zoo.repvgg import RepVGG

GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens"
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NAMES = ["orepa_1x1", "orepa_3x3", "orepa_3x3_stride2_group2", "orepa_large_7x7", "orepa_large_base_7x7"]
VGG = ["orepa_vgg_identity", "orepa_vgg_stride2"]
# The original's average is a single-precision 1/9.
NINTH = 9 * torch.tensor(1 / 9).double()


def test_all_goldens_are_here():
    assert {*NAMES, *VGG} == {path.stem for path in GOLDENS.glob("orepa_*.safetensors")}


@pytest.mark.parametrize("name", NAMES + VGG)
def test_function_gradients_and_fold_are_the_originals(check_block, name):
    net, block = check_block(name, "orepa", after=torch.relu if name in VGG else lambda y: y)
    # Gradients are converted as the parameters are, but for the factor on the average, which is the inverse.
    layer = BLOCKS.layer({**block.state, **block.gradients}, net.conv)
    gradients = {renamed(key, layer.names): value for key, value in layer.tensors.items() if key in block.gradients}
    gradients = {key: value / NINTH**2 if "avg_conv" in key else value for key, value in gradients.items()}
    ours = {key: parameter.grad for key, parameter in net.conv.named_parameters()}
    assert ours.keys() == gradients.keys() - {"input", "norm.weight", "norm.bias"}
    assert all(gradient.abs().max() > 1e-6 for gradient in ours.values())
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[key].double(), rtol=1e-9, atol=1e-9)
    for key in () if name in VGG else ("weight", "bias"):
        torch.testing.assert_close(net.bn.get_parameter(key).grad, block.gradients[f"bn.{key}"], **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_come_through_bit_for_bit(import_state, golden, name):
    block = golden(name)
    net = import_state(block.state, block.plain().float(), "orepa")
    names = BLOCKS.layer(dict(block.state), net.conv).names
    for key, value in block.state.items():
        if "weight0" in key and not any(word in key for word in ("prior", "avg_avg", "id_tensor", "gconv_pw")):
            assert torch.equal(net.conv.state_dict()[renamed(key, names)], value)
    assert net.conv.method == OREPA(large={"orepa_large_7x7": "orepa", "orepa_large_base_7x7": "plain"}.get(name))


def test_the_network_gives_its_logits_and_folds(check_network):
    plain = OREPAResNet((1, 2, 1, 1), 0.125, num_classes=10)
    net = check_network("net_orepa_basic", plain, "orepa")
    layers = foldconv.network.tree.foldable_layers(net)
    assert [type(layer).__name__ for layer in layers.values()] == ["OREPALargeConv2d"] + ["OREPAConv2d"] * 10
    assert type(net.stage2[0].shortcut.conv) is nn.Conv2d
    assert foldconv.fold(net).state_dict().keys() == plain.state_dict().keys()


def test_the_vgg_network_gives_its_logits_and_folds(check_network):
    plain = RepVGG((1, 2, 2, 1), (0.125,) * 4, num_classes=10)
    net = check_network("net_orepa_vgg", plain, "orepa")
    layers = foldconv.network.tree.foldable_layers(net)
    assert [layer.method for layer in layers.values()] == [foldconv.OREPAVGG()] * 7
    assert foldconv.fold(net).state_dict().keys() == plain.state_dict().keys()


def test_a_checkpoint_that_the_original_has_folded(import_state, golden):
    for name, folded in {
        "orepa_1x1": "or1x1_reparam",
        "orepa_3x3": "orepa_reparam",
        "orepa_large_7x7": "or_large_reparam",
    }.items():
        block = golden(name)
        state = {f"{folded}.weight": block.tensors["kernel"], f"{folded}.bias": block.tensors["bias"]}
        net = import_state(state, block.plain(), "orepa")
        x = block.tensors["input"].double()
        torch.testing.assert_close(net(x), block.tensors["output_eval"], **CLOSE)


def kernel_of_the_original(state, groups=1):
    """Its kernel, branch by branch, with whatever prior it has."""
    s = {key.removeprefix("weight_orepa_"): value.double() for key, value in state.items()}
    v = s["vector"][:, :, None, None, None]
    kernel = v[0] * s["origin"] + v[1] * s["avg_conv"] * s["avg_avg"] + v[2] * s["pfir_conv"] * s["prior"][:, None]
    inner = (s["1x1_kxk_idconv1"] + s["id_tensor"]).flatten(1)
    kernel = kernel + v[3] * torch.einsum("ti,othw->oihw", inner, s["1x1_kxk_conv2"])
    centre = (kernel.shape[2] - 1) // 2
    kernel[:, :, centre, centre] += (v[4] * s["1x1"])[:, :, 0, 0]
    depthwise = s["gconv_dw"].reshape(inner.shape[1], 8, *kernel.shape[2:])
    pointwise = s["gconv_pw"].reshape(-1, inner.shape[1], 8)
    return kernel + v[5] * torch.einsum("oit,ithw->oihw", pointwise, depthwise)


def test_the_kernel_of_the_original(golden):
    block = golden("orepa_3x3")
    norm = {key[3:]: value.double() for key, value in block.state.items() if key.startswith("bn.")}
    scale = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
    kernel = kernel_of_the_original(block.state) * scale[:, None, None, None]
    torch.testing.assert_close(kernel, block.tensors["kernel"], **CLOSE)


def test_a_prior_that_is_not_the_papers_is_imported_composed(import_state, golden):
    block = golden("orepa_3x3")
    state = {**block.state, "weight_orepa_prior": torch.randn(8, 3, 3)}
    layer = import_state(state, block.plain(), "orepa").conv
    torch.testing.assert_close(layer.kernel(), kernel_of_the_original(state), **CLOSE)
    torch.testing.assert_close(layer.weight, layer.kernel(), rtol=0, atol=0)
    assert layer.vector[1:].abs().max() == 0
    assert torch.equal(layer.gconv_dw.float(), state["weight_orepa_gconv_dw"])


def test_kernels_of_other_sizes_are_imported_composed(import_state):
    plain = nn.Sequential(nn.Conv2d(4, 6, 5, padding=2, bias=False), nn.BatchNorm2d(6)).double()
    rich = foldconv.expand(plain, "orepa", init="paper")
    back = {ours: theirs for theirs, ours in BLOCKS.layer({}, rich[0]).names.items()}
    state = {renamed(key, back): torch.randn(value.shape) for key, value in rich[0].state_dict().items()}
    state["vector"] = torch.randn(6, 6)
    state |= {f"bn.{key}": value for key, value in rich[1].state_dict().items()}
    state |= {"weight_orepa_prior": torch.randn(6, 5, 5), "weight_orepa_avg_avg": torch.full((5, 5), 1 / 25)}
    layer = import_state(state, plain, "orepa")[0]
    assert layer.vector[1:].abs().max() == 0
    wanted = kernel_of_the_original({**state, "id_tensor": torch.eye(4)[:, :, None, None]})
    torch.testing.assert_close(layer.kernel(), wanted, **CLOSE)


def test_odd_widths_in_a_chain_are_imported_composed(import_state, golden):
    """Their later kernels have cosines of half frequencies, which the flip turns into sines."""
    from foldconv.methods._orepa_branches import Branches

    torch.manual_seed(0)
    state, kernels, channels = {}, [], 3
    for stage in range(3):
        branches = Branches(channels, 5, (3, 3), 1)
        back = {ours: theirs for theirs, ours in BLOCKS.layer({}, nn.Conv2d(channels, 5, 3)).names.items()}
        own = {back[key]: torch.randn(shape) for key, shape in branches.shapes().items()}
        own["weight_orepa_prior"] = branches.prior(torch.zeros(())).reshape(5, 3, 3)
        own["weight_orepa_avg_avg"], own["id_tensor"] = torch.full((3, 3), 1 / 9), torch.eye(channels)[:, :, None, None]
        state |= {f"weight{stage}.{key}": value for key, value in own.items()}
        kernels.append(kernel_of_the_original(own))
        channels = 5
    kernel = kernels[0].transpose(0, 1)
    for later in kernels[1:]:
        kernel = nn.functional.conv2d(kernel, later, padding=2)
    plain = nn.Sequential(nn.Conv2d(3, 5, 7, padding=3, bias=False), nn.BatchNorm2d(5)).double()
    state |= {f"bn.{key}": value for key, value in plain[1].state_dict().items()}
    layer = import_state(state, plain, "orepa")[0]
    torch.testing.assert_close(layer.kernel(), kernel.transpose(0, 1), **CLOSE)
    scales = [layer.get_parameter(f"vector{stage}")[1:].abs().max() > 0 for stage in range(3)]
    assert scales == [True, False, False]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("orepa_3x3", {"vector": None}, "1 missing: vector; nothing"),
        ("orepa_3x3", {"weight_orepa_gconv_pw": (3, 4)}, "weight_orepa_gconv_pw (expected (8, 48, 1, 1), received (3,"),
        ("orepa_3x3", {"weight_orepa_extra": (1,)}, "1 surplus: weight_orepa_extra; nothing"),
        ("orepa_large_7x7", {"weight1.vector": None}, "1 missing: weight1.vector; nothing"),
        ("orepa_large_7x7", {"weight3.vector": (6, 6)}, "1 surplus: weight3.vector; nothing"),
        ("orepa_vgg_stride2", {"rbr_1x1.bn.bias": None}, "1 missing: rbr_1x1.bn.bias; nothing"),
        ("orepa_vgg_stride2", {"rbr_dense.vector": (4, 6)}, "rbr_dense.vector (expected (5, 6), received (4, 6));"),
        ("orepa_1x1", {"bn.weight": (3,)}, "1 misshapen: bn.weight (expected (7,), received (3,)); nothing"),
    ],
)
def test_what_is_wrong_is_listed_by_the_originals_names(import_state, golden, name, change, message):
    block = golden(name)
    state = block.state | {key: torch.zeros(shape) for key, shape in change.items() if shape is not None}
    state = {key: value for key, value in state.items() if change.get(key, ()) is not None}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        import_state(state, block.plain(), "orepa")
