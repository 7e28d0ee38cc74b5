"""RepVGG's goldens, and what all block importers say about files that do not fit."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import foldconv
from foldconv import CheckpointError
from foldconv.files.originals._blocks import renamed
from foldconv.files.originals.repvgg import BLOCKS
from foldconv.lab.zoo.repvgg import RepVGG

GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens"
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("name", ["repvgg_identity", "repvgg_stride2"])
def test_function_gradients_and_fold_are_the_originals(check_block, name):
    net, block = check_block(name, "repvgg", after=torch.relu)
    names = BLOCKS.layer({}, net.conv).names
    gradients = {f"{renamed(key, names)}": value for key, value in block.gradients.items() if key != "input"}
    ours = {key: parameter.grad for key, parameter in net.conv.named_parameters()}
    assert ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(ours[key], gradient, **CLOSE)
    assert ("identity" in dict(net.conv.body.named_children())) == (name == "repvgg_identity")


def test_parameters_come_through_bit_for_bit(import_state, golden):
    block = golden("repvgg_identity")
    layer = import_state(block.state, block.plain(), "repvgg").conv
    assert torch.equal(layer.conv.weight.float(), block.state["rbr_dense.conv.weight"])
    assert torch.equal(layer.body.identity[0].running_var.float(), block.state["rbr_identity.running_var"])


def small():
    return RepVGG((1, 2, 2, 1), (0.125,) * 4, num_classes=10).double()


def checkpoint():
    return torch.load(GOLDENS / "net_repvgg.pth.tar", weights_only=True)["state_dict"]


def test_the_network_gives_its_logits_and_folds(check_network):
    net = check_network("net_repvgg", small(), "repvgg")
    assert len(foldconv.network.tree.foldable_layers(net)) == 7
    assert foldconv.fold(net).state_dict().keys() == small().state_dict().keys()


def test_names_of_the_plain_networks_parts_do_not_matter(import_state, golden):
    block = golden("repvgg_identity")
    parts = block.plain()
    for plain in (nn.Sequential(parts.conv, parts.bn), nn.Sequential(nn.Sequential(parts), nn.ReLU())):
        net = import_state(block.state, plain, "repvgg").eval()
        torch.testing.assert_close(torch.relu(net(block.tensors["input"].double())), block.tensors["output_eval"])


def test_a_convolution_itself_stands_for_a_block(import_state, golden):
    block = golden("repvgg_identity")
    plain = nn.Sequential(OrderedDict(conv1=block.plain().conv, bn1=block.plain().bn))
    net = import_state({f"conv1.{key}": value for key, value in block.state.items()}, plain, "repvgg").eval()
    torch.testing.assert_close(torch.relu(net(block.tensors["input"].double())), block.tensors["output_eval"], **CLOSE)


class Attentive(nn.Module):
    """A block with squeeze-and-excitation behind its branches, as in RepVGG-D2se."""

    def __init__(self, parts):
        super().__init__()
        self.conv, self.bn = parts.conv, parts.bn
        self.se = nn.Sequential(OrderedDict(down=nn.Conv2d(6, 2, 1), relu=nn.ReLU(), up=nn.Conv2d(2, 6, 1))).double()

    def forward(self, x):
        y = self.bn(self.conv(x))
        return torch.relu(y * torch.sigmoid(self.se(y.mean((2, 3), keepdim=True))))


def test_what_else_a_block_holds_keeps_its_names(import_state, golden):
    block = golden("repvgg_identity")
    net = nn.Sequential(OrderedDict((name, Attentive(block.plain())) for name in ("a", "ab", "b")))
    state = {f"{name}.{key}": value for name in ("a", "ab", "b") for key, value in block.state.items()}
    state |= {key: value + 1 for key, value in net.state_dict().items() if ".se." in key}
    rich = import_state(state, net, "repvgg").eval()
    assert torch.equal(rich.ab.se.up.weight, state["ab.se.up.weight"])
    x = block.tensors["input"].double()
    torch.testing.assert_close(torch.relu(rich.ab.bn(rich.ab.conv(x))), block.tensors["output_eval"], **CLOSE)


def folded_by_the_original():
    """What its ``switch_to_deploy`` leaves."""
    net = foldconv.import_checkpoint(GOLDENS / "net_repvgg.pth.tar", small(), source="repvgg")
    state = foldconv.fold(net, batchnorm=True).state_dict()
    return {key.replace(".conv.", ".rbr_reparam."): value for key, value in state.items()}, net.eval()


def test_a_checkpoint_that_the_original_has_folded(import_state):
    state, net = folded_by_the_original()
    assert "stage1.0.rbr_reparam.bias" in state
    plain = import_state(state, small(), "repvgg").eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(plain(x), net(x), **CLOSE)
    assert type(plain.stage1[0].conv) is nn.Conv2d
    assert type(plain.stage1[0].bn) is nn.Identity


def test_a_folded_single_block(import_state, golden):
    block = golden("repvgg_stride2")
    state = {"rbr_reparam.weight": block.tensors["kernel"], "rbr_reparam.bias": block.tensors["bias"]}
    net = import_state(state, block.plain(), "repvgg")
    torch.testing.assert_close(torch.relu(net(block.tensors["input"].double())), block.tensors["output_eval"], **CLOSE)


def test_counters_of_batches_may_be_absent(import_state):
    state = {key: value for key, value in checkpoint().items() if "num_batches" not in key}
    net = import_state(state, small(), "repvgg")
    assert net.stage0.conv.norm.num_batches_tracked == 0


# ---------------------------------------------------------------------- files that do not fit


def without(word):
    return lambda s: {key: value for key, value in s.items() if word not in key}


def shaped(key, *shape):
    return lambda s: {**s, f"module.{key}": torch.zeros(shape)}


DENSE = "stage1.0.rbr_dense.conv.weight"
BROKEN = {
    "1 missing: stage1.0.rbr_1x1.bn.bias; nothing was loaded": without("stage1.0.rbr_1x1.bn.bias"),
    "missing: stage2.1.rbr_identity.bias, stage2.1.rbr_identity.running_mean": without("stage2.1.rbr_identity"),
    "1 surplus: stage1.0.rbr_1x1.extra; nothing": shaped("stage1.0.rbr_1x1.extra", 1),
    "1 surplus: stage1.0.rbr_reparam.weight; nothing": shaped("stage1.0.rbr_reparam.weight", 1),
    f"1 misshapen: {DENSE} (expected (8, 8, 3, 3), received (8, 9, 3, 3)); nothing": shaped(DENSE, 8, 9, 3, 3),
    "1 misshapen: linear.weight (expected (10, 64), received (1000, 64))": shaped("linear.weight", 1000, 64),
    "holds a RepVGG block 'stage5', but RepVGG has no module there; expected one convolution that a norm follows": (
        shaped("stage5.rbr_dense.conv.weight", 1)
    ),
    "holds a RepVGG block 'linear', but RepVGG has 0 such in Linear there": shaped("linear.rbr_dense.conv.weight", 1),
    "holds a RepVGG block 'stage2', but RepVGG has 2 such in Sequential there": (
        shaped("stage2.rbr_dense.conv.weight", 1)
    ),
    "has no layer of 'repvgg', but its keys are those of do-conv; pass source='do-conv'": lambda s: {
        "conv.W": torch.zeros(1)
    },
    "holds RepVGG blocks 'stage1.0' and 'stage1', but RepVGG has one convolution for both": (
        shaped("stage1.rbr_dense.conv.weight", 1)
    ),
    "holds no RepVGG block; is it a plain network's": lambda s: {"conv.weight": torch.zeros(1)},
    "holds both stage1.0.conv.body.main.conv.weight and stage1.0.rbr_dense": lambda s: {
        "module.stage1.0.conv.body.main.conv.weight": torch.zeros(1),
        **s,
    },
    "expected a dictionary of tensors": lambda s: {"epoch": 1},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_checkpoint_that_does_not_fit_says_why_and_changes_nothing(import_state, message):
    net = small()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        import_state(BROKEN[message](checkpoint()), net, "repvgg")
    assert "\n" not in str(error.value)
    assert "checkpoint.pth: " in str(error.value)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


def test_another_networks_checkpoint(import_state):
    with pytest.raises(CheckpointError, match=r"block 'stage2.1', but RepVGG has no module there.*is it the plain net"):
        import_state(checkpoint(), RepVGG((1, 1, 1, 1), (0.125,) * 4), "repvgg")
    with pytest.raises(CheckpointError, match=r"does not fit RepVGG; .* missing: .*stage4.1.*misshapen: linear"):
        import_state(checkpoint(), RepVGG((1, 2, 2, 2), (0.125,) * 4), "repvgg")


def test_a_convolution_that_the_method_cannot_expand(import_state):
    state = {"rbr_dense.conv.weight": torch.zeros(4, 4, 1, 1)}
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(CheckpointError, match="block '', but 0 of Sequential cannot become repvgg: its kernel has one"):
        import_state(state, plain, "repvgg")
