"""Write docs/networks.md: how much of well-known networks is expanded and absorbed, and how exact their folds are.

    pip install timm torchvision ultralytics transformers segmentation-models-pytorch mmengine
    python docs/networks.py                       # all of it, some minutes
    python docs/networks.py --only timm/hrnet     # those whose name holds this, printed only

Each network, with its norms' statistics drawn at random, is expanded, trained for three steps in float64, and folded
with `batchnorm=True`; the folded network's outputs are compared with the expanded one's, each difference relative to
the output's largest value. Nothing is downloaded. A package that is not installed leaves its rows out.
"""

import argparse
import dataclasses
import importlib
import logging
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import foldconv
from foldconv.network.tree import foldable_layers

METHODS = ("doconv", "repvgg")
TIMM = [
    "resnet18",
    "resnet26d",
    "seresnet50",
    "res2net50_14w_8s",
    "regnetx_002",
    "regnety_002",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "efficientnetv2_rw_t",
    "tf_efficientnet_lite0",
    "mnasnet_small",
    "ghostnet_100",
    "hardcorenas_a",
    "rexnet_100",
    "densenet121",
    "dla34",
    "hrnet_w18_small",
    "cspresnet50",
    "cspdarknet53",
    "ese_vovnet19b_dw",
    "selecsls42b",
    "xception41",
    "repvgg_a0",
    "mobileone_s0",
]
HEAD = """# Networks of other people

How much of well-known networks foldconv reaches, and how exact what comes back is. *Expanded*: convolutions that became
foldable, of all there are. *Absorbed*: batch norms that `fold(batchnorm=True)` took into a convolution after `repvgg`,
of all there are. *Error*: the largest difference between the outputs of the expanded and the folded network after three
training steps in float64, relative to the largest output. Each call is given `example_inputs`; `foldconv.plan` tells
why a convolution stays: most have one tap, where these two methods have nothing to gain. Written by
`python docs/networks.py`.

| network | expanded, doconv | expanded, repvgg | absorbed | error, doconv | error, repvgg |
|---|---|---|---|---|---|
"""


def networks():
    """Each network's name, a function that builds it, and the side of a square image that it takes."""
    for name in TIMM:
        yield f"timm/{name}, features_only", _timm(name, features_only=True), 64
    yield "timm/resnet18, checkpointed", _checkpointed, 64
    yield "torchvision/resnet18, compiled", _compiled, 64
    for name in ("resnet50", "mobilenet_v2", "shufflenet_v2_x0_5", "googlenet", "regnet_x_400mf"):
        yield f"torchvision/{name}", _torchvision("torchvision.models", name), 96
    yield "torchvision/r3d_18", _torchvision("torchvision.models.video", "r3d_18"), (3, 4, 32, 32)
    name = "lraspp_mobilenet_v3_large"
    yield f"torchvision/{name}", _torchvision("torchvision.models.segmentation", name), 64
    for name in ("ResNet", "RegNet", "MobileNetV2", "Levit"):
        yield f"transformers/{name}Model", _transformers(name), 224 if name == "Levit" else 64
    for name in ("yolov8n", "yolo11n", "yolov5n"):
        yield f"ultralytics/{name}", _ultralytics(name), 64
    for name in ("Unet", "FPN", "DeepLabV3Plus", "Linknet"):
        yield f"smp/{name}", _smp(name, "resnet18"), 64
    yield "smp/Unet, tu-resnet18", _smp("Unet", "tu-resnet18"), 64
    yield "mmengine/BaseModel", _mmengine, 64


def _timm(name, **options):
    return lambda: importlib.import_module("timm").create_model(name, **options)


def _checkpointed():
    model = _timm("resnet18")()
    model.set_grad_checkpointing()
    return model


def _compiled():
    return torch.compile(_torchvision("torchvision.models", "resnet18")(), backend="eager")


def _torchvision(module, name):
    options = {"weights": None} | ({"init_weights": False} if name == "googlenet" else {})
    options |= {"weights_backbone": None} if "segmentation" in module else {}
    return lambda: getattr(importlib.import_module(module), name)(**options)


def _transformers(name):
    def build():
        package = importlib.import_module("transformers")
        return getattr(package, f"{name}Model")(getattr(package, f"{name}Config")())

    return build


def _ultralytics(name):
    return lambda: importlib.import_module("ultralytics").YOLO(f"{name}.yaml", verbose=False).model.requires_grad_()


def _smp(name, encoder):
    return lambda: getattr(importlib.import_module("segmentation_models_pytorch"), name)(encoder, encoder_weights=None)


def _mmengine():
    base = importlib.import_module("mmengine.model").BaseModel

    class Classifier(base):
        def __init__(self):
            super().__init__()
            self.backbone = _torchvision("torchvision.models", "resnet18")()

        def forward(self, inputs, data_samples=None, mode="tensor"):
            y = self.backbone(inputs)
            return {"loss": y.square().mean()} if mode == "loss" else y

    return Classifier()


def row(build, size):
    """The row's cells behind the name."""
    cells = {}
    for method in METHODS:
        torch.manual_seed(0)
        net = stirred(build().double())
        shape = size if isinstance(size, tuple) else (3, size, size)
        x = torch.randn(2, *shape, dtype=torch.float64)
        rich = foldconv.expand(net, method, example_inputs=x)
        train(rich, x)
        plain = foldconv.fold(rich, batchnorm=True, example_inputs=x)
        expanded = len(foldable_layers(rich))
        convs = sum(isinstance(module, nn.modules.conv._ConvNd) for module in net.modules())
        norms, left = (sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in n.modules()) for n in (net, plain))
        cells[method] = f"{expanded} of {convs}", f"{norms - left} of {norms}", error(rich, plain, x)
    (taken, _, one), (branched, absorbed, two) = (cells[method] for method in METHODS)
    return [taken, branched, absorbed, f"{one:.0e}", f"{two:.0e}"]


def stirred(net):
    """Norm statistics as after some training."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def train(net, x, steps=3):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(y.square().mean() for y in tensors(net(x))).backward()
        optimizer.step()
    net.eval()


@torch.no_grad()
def error(before, after, x):
    after.eval()
    pairs = list(zip(tensors(before(x)), tensors(after(x)), strict=True))
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs if a.abs().max() > 0)


def tensors(output):
    """The floating point tensors in whatever a network gives."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if dataclasses.is_dataclass(output) and not isinstance(output, dict):
        output = vars(output)
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else []
    return [tensor for value in values for tensor in tensors(value)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this; they are printed, nothing is written")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.getLogger("foldconv").setLevel(logging.ERROR)
    rows, packages = [], {"torch"}
    for name, build, size in networks():
        if only in name:
            print(name, file=sys.stderr, flush=True)
            package = name.partition("/")[0].replace("smp", "segmentation-models-pytorch")
            try:
                cells = row(build, size)
            except ModuleNotFoundError as missing:
                print(f"  left out: {missing}", file=sys.stderr)
                continue
            packages.add(package)
            rows.append("| " + " | ".join([name, *cells]) + " |")
            print(rows[-1], file=sys.stderr, flush=True)
    used = ", ".join(f"{package} {version(package).partition('+')[0]}" for package in sorted(packages))
    text = HEAD + "\n".join(rows) + f"\n\nMeasured with {used} on {platform.machine()} (CPU), seed 0.\n"
    if only:
        print(text)
    else:
        Path(__file__).with_name("networks.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
