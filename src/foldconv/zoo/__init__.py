"""Architectures that timm and torchvision lack, one family per file, and one `create` for all three sources."""

from ._registry import create, input_shape, list_architectures
from .small_resnet import SmallResNet, digits_resnet

__all__ = ["SmallResNet", "create", "digits_resnet", "input_shape", "list_architectures"]
