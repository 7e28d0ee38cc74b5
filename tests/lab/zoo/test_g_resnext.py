"""G-ResNeXt: the original's logits, expanded and folded; ResNeXt's parameter counts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.zoo import GResNeXt
from foldconv.layers.permuted import PermutedConv2d
from foldconv.methods.dgconv import complexity

GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens"
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def golden():
    """The original's small network in float64, with an input and its logits."""
    plain = GResNeXt((1, 1), groups=2, width_per_group=4, num_classes=10)
    net = foldconv.import_checkpoint(GOLDENS / "net_g_resnext.pth.tar", plain, source="dgconv")
    tensors = load_file(GOLDENS / "net_g_resnext.safetensors")
    return net.double().eval(), tensors["input"].double(), tensors["logits"], tensors["regularizer"]


def test_logits_and_regularizer_are_the_originals(golden):
    net, x, logits, regularizer = golden
    torch.testing.assert_close(net(x), logits, **CLOSE)
    assert complexity(net).item() == regularizer.item() == 40


@pytest.mark.parametrize("batchnorm", [False, True])
def test_folds_to_a_grouped_network_with_the_same_logits(golden, batchnorm):
    net, x, logits, _ = golden
    folded = foldconv.fold(net, batchnorm=batchnorm)
    torch.testing.assert_close(folded(x), logits, **CLOSE)
    convs = [folded.layer1[0].conv2, folded.layer2[0].conv2]
    assert [(conv.groups, tuple(conv.weight.shape)) for conv in convs] == [(8, (8, 1, 3, 3)), (8, (16, 2, 3, 3))]
    # Depthwise groups need no order; the second layer's gates are interleaved.
    assert [type(conv) for conv in convs] == [torch.nn.Conv2d, PermutedConv2d]
    plain = foldconv.absorb_permutations(folded)
    assert not any(isinstance(module, PermutedConv2d) for module in plain.modules())
    torch.testing.assert_close(plain(x), logits, **CLOSE)
    before, after = (foldconv.summary(m, x) for m in (net, plain))
    rows = [{row.name: row for row in s.rows}["layer2.0.conv2"] for s in (before, after)]
    assert rows[0].macs_training > 8 * rows[0].macs_folded
    assert rows[1].macs_training == rows[0].macs_folded == x.shape[0] * 8 * 8 * 16 * 2 * 9
    assert after.parameters_training < before.parameters_training


def test_folded_it_is_torchvisions_resnext():
    resnet = pytest.importorskip("torchvision").models.resnet
    torch.manual_seed(0)
    net = foldconv.expand(
        GResNeXt((2, 1, 1, 1), groups=4, width_per_group=2, num_classes=5), foldconv.DGConv(sort=True), include="*conv2"
    )
    for layer in (m for m in net.modules() if isinstance(m, foldconv.DGConv2d)):
        layer.gates.data[0], layer.gates.data[-1] = -1, -1
    net = net.double().eval()
    theirs = resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], 5, groups=4, width_per_group=2).double().eval()
    theirs.load_state_dict(foldconv.fold(net).state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(net(x), theirs(x), **CLOSE)


@pytest.mark.parametrize(
    ("name", "published"),
    # ResNeXt-50 32x4d and ResNeXt-101 32x8d, as torchvision states them.
    [("g_resnext50", 25_028_904), ("g_resnext101", 88_791_336)],
)
def test_parameter_count_with_32_groups_is_the_published_one(name, published):
    with torch.device("meta"):
        net = zoo.create(name)
    total = sum(p.numel() for p in net.parameters())
    grouped = sum(p.numel() for key, p in net.named_parameters() if key.endswith("conv2.weight"))
    assert total - grouped + grouped // 32 == published


def test_zero_init_residual():
    net = GResNeXt((1,), groups=1, width_per_group=2, zero_init_residual=True)
    assert not net.layer1[0].bn3.weight.any()
    assert GResNeXt((1,), groups=1, width_per_group=2).layer1[0].bn3.weight.all()


@pytest.mark.parametrize("layers", [(), (1, 0), (1, 1, 1, 1, 1)])
def test_stages_that_cannot_be(layers):
    with pytest.raises(UnsupportedError, match="one to four stages of at least one block, received") as error:
        GResNeXt(layers)
    assert str(layers) in str(error.value)
