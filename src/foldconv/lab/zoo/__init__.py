"""Architectures that timm and torchvision lack, one family per file, and one `create` for all three sources."""

from ._registry import check_name, create, example_images, input_shape, list_architectures
from .cifar_quick import CifarQuick
from .cifar_resnet import CifarResNet
from .expandnets import SmallNet
from .g_resnext import GResNeXt, g_resnext50, g_resnext101
from .gluoncv_resnet import GluonCVResNet
from .mnist_demo import mnist_demo, mnist_demo_gluon, mnist_demo_tensorflow
from .orepa_resnet import OREPAResNet
from .plain_resnet import PlainNet
from .repvgg import RepVGG
from .small_resnet import SmallResNet, digits_resnet

__all__ = [
    "CifarQuick",
    "CifarResNet",
    "GResNeXt",
    "GluonCVResNet",
    "OREPAResNet",
    "PlainNet",
    "RepVGG",
    "SmallNet",
    "SmallResNet",
    "check_name",
    "create",
    "digits_resnet",
    "example_images",
    "g_resnext50",
    "g_resnext101",
    "input_shape",
    "list_architectures",
    "mnist_demo",
    "mnist_demo_gluon",
    "mnist_demo_tensorflow",
]
