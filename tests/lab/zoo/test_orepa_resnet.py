"""The OREPA repository's ResNets: torchvision's functions and sizes under other names."""

import pytest
import torch

from foldconv.errors import UnsupportedError
from foldconv.lab import zoo
from foldconv.lab.zoo.orepa_resnet import OREPAResNet

torchvision = pytest.importorskip("torchvision")
resnet = torchvision.models.resnet


@pytest.mark.parametrize("depth", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50"])
def test_as_many_parameters_as_torchvisions(depth):
    with torch.device("meta"):
        ours = zoo.create(f"orepa_{depth}")
        theirs = getattr(torchvision.models, "resnext50_32x4d" if depth == "resnext50" else depth)()
    shapes = [sorted(tuple(t.shape) for t in net.state_dict().values()) for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("block", "options", "theirs"),
    [
        (resnet.BasicBlock, {}, {}),
        (resnet.Bottleneck, {"bottleneck": True}, {}),
        (
            resnet.Bottleneck,
            {"bottleneck": True, "groups": 4, "width_per_group": 8},
            {"groups": 4, "width_per_group": 8},
        ),
    ],
)
def test_the_function_is_torchvisions(block, options, theirs):
    torch.manual_seed(0)
    other = resnet.ResNet(block, [1, 2, 1, 1], 10, **theirs).double().eval()
    ours = OREPAResNet((1, 2, 1, 1), num_classes=10, **options).double().eval()
    for module in other.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias)
    ours.load_state_dict({as_ours(key): value for key, value in other.state_dict().items()})
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(ours(x), other(x), rtol=1e-10, atol=1e-10)


def as_ours(key):
    """torchvision's name: ``layer1.0.bn2.weight`` is our ``stage1.0.conv2.bn.weight``."""
    head, last = key.rsplit(".", 1)
    if head == "fc":
        return f"linear.{last}"
    head = head.replace("layer", "stage") if head.startswith("layer") else f"stage0.{head}"
    head = head.replace("downsample.0", "shortcut.conv").replace("downsample.1", "shortcut.bn")
    if "shortcut" not in head:
        owner, name = head.rsplit(".", 1)
        head = f"{owner}.conv{name[-1]}.{name[:-1]}"
    return f"{head}.{last}"


def test_width_scales_every_stage():
    with torch.device("meta"):
        net = zoo.create("orepa_resnet18", width=1.5)
        wide = zoo.create("orepa_resnet18", width=2)
    assert [net.get_submodule(f"stage{i}.0.conv1.conv").out_channels for i in (1, 2, 3, 4)] == [96, 192, 384, 768]
    # All but the norms and the ends grow with the square.
    convs = sum(p.numel() for n, p in wide.named_parameters() if n.endswith("conv.weight"))
    with torch.device("meta"):
        plain = zoo.create("orepa_resnet18")
    once = {n: p.numel() for n, p in plain.named_parameters() if n.endswith("conv.weight")}
    assert convs == 4 * sum(once.values()) - 2 * once["stage0.conv1.conv.weight"]


def test_arguments_that_cannot_be():
    with pytest.raises(UnsupportedError, match=r"expected four stages of at least one block, received \(1, 2\)"):
        OREPAResNet((1, 2))
    with pytest.raises(UnsupportedError, match="groups=4 is for the 3×3 of bottlenecks; pass bottleneck=True"):
        OREPAResNet(groups=4)
