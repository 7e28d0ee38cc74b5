"""GluonCV's ResNets: MXNet's published sizes, torchvision's function for v1b, and what sets the versions apart."""

import json
import runpy
from pathlib import Path

import pytest
import torch

import foldconv
from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.zoo import GluonCVResNet

# "# Parameters" in the model zoo table of MXNet's documentation (gluon.model_zoo.vision), which counts the norms'
# running means and variances too, and for v2 the scale and shift, fixed at 1 and 0, of the norm on the images.
MXNET = {
    "resnet18_v1": 11_699_112,
    "resnet34_v1": 21_814_696,
    "resnet50_v1": 25_629_032,
    "resnet101_v1": 44_695_144,
    "resnet152_v1": 60_404_072,
    "resnet18_v2": 11_695_796,
    "resnet34_v2": 21_811_380,
    "resnet50_v2": 25_595_060,
    "resnet101_v2": 44_639_412,
    "resnet152_v2": 60_329_140,
}
# "num_params" in torchvision's documentation of its pretrained weights: v1b is its network.
TORCHVISION = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize("name", MXNET)
def test_as_many_parameters_as_mxnet_states(name):
    with torch.device("meta"):
        net = zoo.create(f"gluoncv_{name}")
    state = net.state_dict()
    counted = sum(value.numel() for key, value in state.items() if not key.endswith("num_batches_tracked"))
    assert counted + (6 if name.endswith("v2") else 0) == MXNET[name]


@pytest.mark.parametrize("depth", TORCHVISION)
def test_v1b_has_as_many_parameters_as_torchvision_states(depth):
    with torch.device("meta"):
        net = zoo.create(f"gluoncv_resnet{depth}_v1b")
    assert sum(p.numel() for p in net.parameters()) == TORCHVISION[depth]


@pytest.mark.parametrize("bottleneck", [False, True])
def test_v1b_is_torchvisions_function_under_its_names(bottleneck):
    resnet = pytest.importorskip("torchvision").models.resnet
    torch.manual_seed(0)
    theirs = resnet.ResNet(resnet.Bottleneck if bottleneck else resnet.BasicBlock, [1, 2, 1, 1], 10).double().eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias)
    ours = GluonCVResNet("v1b", (1, 2, 1, 1), bottleneck, num_classes=10).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_v1_and_v2_compute_what_mxnet_does(version, bottleneck):
    mxnet = runpy.run_path(str(Path(__file__).with_name("mxnet_resnet_logits.py")))
    net = GluonCVResNet(version, (1, 2, 1, 1), bottleneck, width=4, num_classes=3).double().eval()
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items() if value.ndim}
    if version == "v2":  # of the norm on the images, which has running statistics only
        assert {key for key in shapes if key.startswith("features.0.")} == {
            "features.0.running_mean",
            "features.0.running_var",
        }
    state = {key: torch.from_numpy(array) for key, array in mxnet["values"](shapes).items()}
    net.load_state_dict(state, strict=False)
    expected = json.loads(mxnet["FILE"].read_text())[f"{version} {'bottle_neck' if bottleneck else 'basic_block'}"]
    logits = net(torch.from_numpy(mxnet["image"]()))
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("version", "first", "middle", "biases"),
    [("v1", "body.0", "body.3", True), ("v1b", "conv1", "conv2", False), ("v2", "conv1", "conv2", False)],
)
def test_where_a_bottleneck_has_its_stride_and_biases(version, first, middle, biases):
    net = GluonCVResNet(version, (1, 1, 1, 1), bottleneck=True, width=8)
    block = [m for m in net.modules() if type(m).__name__.startswith("Block")][1]
    strides = [block.get_submodule(name).stride[0] for name in (first, middle)]
    assert strides == ([2, 1] if version == "v1" else [1, 2])
    assert (block.get_submodule(first).bias is not None) == biases
    assert block.get_submodule(middle).bias is None


def test_names_are_those_of_gluons_files():
    keys = set(GluonCVResNet("v1", (1, 1, 1, 1), bottleneck=True, width=8).state_dict())
    assert {"features.0.weight", "features.5.0.body.6.bias", "features.5.0.downsample.1.weight"} <= keys
    keys = set(GluonCVResNet("v2", (1, 1, 1, 1), width=8).state_dict())
    assert {"features.0.running_mean", "features.6.0.downsample.weight", "features.9.weight", "output.bias"} <= keys
    assert "features.0.weight" not in keys


@pytest.mark.parametrize("version", ["v1", "v1b"])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_last_gamma_starts_every_block_as_its_shortcut(version, bottleneck):
    torch.manual_seed(0)
    net = GluonCVResNet(version, (1, 1, 1, 1), bottleneck, width=8, last_gamma=True)
    for block in (m for m in net.modules() if type(m).__name__.startswith("Block")):
        convolution = next(block.children() if version == "v1b" else block.body.children())
        x = torch.randn(2, convolution.in_channels, 8, 8)
        shortcut = x if block.downsample is None else block.downsample(x)
        torch.testing.assert_close(block(x), shortcut.relu())
        norms = [m for key, m in block.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and "down" not in key]
        assert [bool(norm.weight.any()) for norm in norms] == [True] * (len(norms) - 1) + [False]
    plain = GluonCVResNet(version, (1, 1, 1, 1), bottleneck, width=8)
    assert all(m.weight.all() for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_last_gamma_reaches_the_named_networks():
    net = zoo.create("gluoncv_resnet18_v1b", width=8, last_gamma=True)
    assert not net.layer4[1].bn2.weight.any()
    assert net.layer4[1].bn1.weight.all()


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("version", ["v1", "v1b", "v2"])
def test_expands_and_folds_back(folds_back, version, bottleneck):
    folds_back(GluonCVResNet(version, (1, 1, 1, 1), bottleneck, width=4))


def test_folds_with_its_norms_and_biases():
    torch.manual_seed(0)
    net = GluonCVResNet("v1", (1, 1, 1, 1), bottleneck=True, width=4).eval()
    folded = foldconv.fold(net, batchnorm=True)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)


def test_arguments_that_cannot_be():
    with pytest.raises(UnsupportedError, match="version: expected one of v1, v1b, v2, received 'v3'"):
        GluonCVResNet("v3")
    with pytest.raises(UnsupportedError, match=r"expected four stages of at least one block, received \(1, 2\)"):
        GluonCVResNet("v1", (1, 2))
    with pytest.raises(UnsupportedError, match="last_gamma=True would keep the blocks of v2 at zero"):
        zoo.create("gluoncv_resnet18_v2", last_gamma=True)
