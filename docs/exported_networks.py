"""Write docs/exported-networks.md: well-known networks, expanded, folded, written as ONNX and run by ONNX Runtime.

    pip install ".[onnx]" timm torchvision
    python docs/exported_networks.py                   # all of it, some minutes
    python docs/exported_networks.py --only squeezenet # rows whose name holds this; the others stay as they are
    python docs/exported_networks.py --missing         # rows that are not there, or that failed: to go on after a stop

Each network, one of a family and small, gets random statistics in its norms, is expanded, gets random numbers in all
branches, too, and is exported with `foldconv.export`, which compares what ONNX Runtime computes from the file, at
batches of 1 and 3, with the folded network in float64. Nothing is downloaded.
"""

import argparse
import importlib
import logging
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from networks import METHODS, stirred

import foldconv
from foldconv.network.tree import foldable_layers

PAGE = Path(__file__).with_name("exported-networks.md")
AGREE = 1e-5
TIMM = [
    *(
        "mobilenetv3_small_050",
        "resnet10t",
        "regnetx_002",
        "mobilenetv2_035",
        "lcnet_035",
        "tinynet_e",
        "mnasnet_small",
    ),
    *("ghostnet_050", "repvgg_a0", "mobileone_s0", "convnext_atto", "selecsls42b", "ese_vovnet19b_slim", "dla46_c"),
    *("starnet_s1", "hardcorenas_a", "rexnet_100", "efficientnet_b0", "cs3darknet_focus_s", "skresnet18", "resnest14d"),
    *("mobilenetv4_conv_small_050", "nf_regnet_b0", "repghostnet_050", "edgenext_xx_small", "hrnet_w18_small"),
    *("xception41", "densenet121"),
]
TORCHVISION = ["squeezenet1_1", "shufflenet_v2_x0_5", "googlenet", "resnet18", "video.r3d_18"]
HEAD = """# Networks as ONNX

Networks of timm and torchvision, one of a family, with random statistics in all norms, expanded by `doconv` and by
`repvgg` and written by `foldconv.export`. *Error*: the largest difference between what ONNX Runtime computes from the
file in float32 and the folded network in float64, at batches of 1 and 3, relative to the largest output. *Expanded*:
how many convolutions; 0: none can be, since each standardizes its weight at each call, and the network is written as
it is. Written by `python docs/exported_networks.py`.

| network | input | expanded, doconv | expanded, repvgg | error, doconv | error, repvgg |
|---|---|---|---|---|---|
"""


def networks():
    """Each network's name, a function that builds it, and the shape of its input."""
    for name in TIMM:
        yield f"timm/{name}", lambda name=name: importlib.import_module("timm").create_model(name), (3, 64, 64)
    for name in TORCHVISION:
        module, _, function = f"torchvision.models.{name}".rpartition(".")
        options = {"weights": None} | ({"init_weights": False} if name == "googlenet" else {})

        def build(module=module, function=function, options=options):
            return getattr(importlib.import_module(module), function)(**options)

        yield f"torchvision/{function}", build, (3, 4, 32, 32) if "video" in name else (3, 64, 64)


def row(build, shape):
    """The row's cells behind the name."""
    counts, errors = [], []
    for method in METHODS:
        torch.manual_seed(0)
        x = torch.randn(2, *shape)
        try:
            rich = foldconv.expand(stirred(build()), method, example_inputs=x)
        except foldconv.NoMatchError as error:
            if "standardizes its weight" not in str(error):
                raise
            rich = stirred(build())
        with torch.no_grad():
            for value in stirred(rich).parameters():
                value += 0.01 * torch.randn_like(value)
        with tempfile.TemporaryDirectory() as folder:
            errors.append(foldconv.export(rich, Path(folder, "net.onnx"), x).error)
        counts.append(len(foldable_layers(rich)))
    said = [f"{error:.0e}" + ("" if error <= AGREE else f", above {AGREE:.0e}") for error in errors]
    return ["×".join(map(str, shape)), *map(str, counts), *said]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this; the others stay as they are")
    parser.add_argument("--missing", action="store_true", help="only rows that are not there, or that failed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("foldconv").setLevel(logging.ERROR)
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    rows = dict(re.findall(r"^\| (\w+/\w+) \| (.*) \|$", written, re.MULTILINE))
    for name, build, shape in networks():
        whole = name in rows and not rows[name].endswith("| | | | ")
        if options.only in name and not (options.missing and whole):
            print(name, file=sys.stderr, flush=True)
            try:
                rows[name] = " | ".join(row(build, shape))
            except (foldconv.FoldConvError, RuntimeError) as error:
                rows[name] = f"{type(error).__name__}: {error} | | | | "
            print(f"  {rows[name]}", file=sys.stderr, flush=True)
        table = [f"| {name} | {rows[name]} |" for name, *_ in networks() if name in rows]
        used = ("torch", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime")
        versions = ", ".join(f"{package} {version(package).partition('+')[0]}" for package in used)
        PAGE.write_text(HEAD + "\n".join(table) + f"\n\nWith {versions}, on a CPU, seed 0.\n", encoding="utf-8")


if __name__ == "__main__":
    main()
