"""A small network that methods, norms and stems all find something in, known to the zoo for the time of a test."""

import collections

import pytest
import torch
from torch import nn

from foldconv.lab.zoo import _registry


def build():
    def block(inputs, outputs, size, **geometry):
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **geometry)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32, 7, stride=2),
        *block(32, 8, 1),
        *block(8, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@pytest.fixture(scope="session")
def tiny():
    """The network's name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_registry._BUILDERS, "tiny", build)
        yield "tiny"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
