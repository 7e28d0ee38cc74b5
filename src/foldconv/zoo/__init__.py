"""Architectures that timm and torchvision lack, one family per file, and one `create` for all three sources."""

from ._registry import create, input_shape, list_architectures
from .g_resnext import GResNeXt, g_resnext50, g_resnext101
from .orepa_resnet import OREPAResNet
from .repvgg import RepVGG
from .small_resnet import SmallResNet, digits_resnet

__all__ = [
    "GResNeXt",
    "OREPAResNet",
    "RepVGG",
    "SmallResNet",
    "create",
    "digits_resnet",
    "g_resnext50",
    "g_resnext101",
    "input_shape",
    "list_architectures",
]
