"""What int8 costs the networks that folding gives: docs/int8.md and its results, measured anew by one command.

    python benchmarks/int8.py --data digits
    python benchmarks/int8.py --data cifar10 --data-folder FOLDER
    python benchmarks/int8.py --data digits --qat      # and trained through the rounding, where a method allows it

Each network is trained by `foldconv train`, folded, and quantized for ONNX Runtime with `foldconv.quantize` in several
ways, calibrated with 256 training images and judged by the test images, twice: as int8 says, and as this processor
computes, which without VNNI lets sums of 8-bit products overflow. CIFAR-10 is shortened: see `CASES` and `EVERY`. Runs
stay in --work and results in --out: a measurement that was stopped goes on where it was. --table only writes the
document from the results.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import statistics
import tempfile

import numpy as np
import onnxruntime
import torch
from rich.console import Console

from foldconv import quantize
from foldconv.files.atomic import write_json
from foldconv.lab.data import evaluation_loader, training_loader
from foldconv.lab.data.named import read_named
from foldconv.lab.machine import machine, versions
from foldconv.lab.train import TrainConfig, fit, open_network, resume

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "int8.json"
PAGE = ROOT / "docs" / "int8.md"
METHODS = ("plain", "doconv", "orepa", "repvgg", "qarepvgg", "dbb", "mobileone")
RECIPES = {
    "per tensor": {"per_channel": False, "equalize": False},
    "per channel": {"per_channel": True, "equalize": False},
    "equalized": {"per_channel": False, "equalize": True},
}
QAT = {"qat": {"per_channel": True, "equalize": False}}
"""How a network is quantized that was trained through the rounding: its kernels were rounded per channel."""
QAT_METHODS = ("plain", "doconv", "orepa")
CASES = {
    "digits": {"data": "digits", "architecture": "digits_resnet", "epochs": 10},
    # A quarter of the usual products, a tenth of the images, 3 of 200 epochs: far below published accuracies; int8 is
    # compared with that float.
    "cifar10": {
        **{"data": "cifar10", "architecture": "cifar_resnet20", "architecture_args": {"width": 8}},
        **{"epochs": 3, "batch_size": 64},
    },
}
EVERY = {"cifar10": (10, 5)}
"""Of which images one is taken, for training and for the test, since they may lie in the order of classes; else all."""
BEGIN, END = "<!-- int8: written by benchmarks/int8.py -->\n", "<!-- end of int8 -->"


def shortened(name, work, data_folder):
    """The folder of a set's images that `EVERY` leaves, written now or before."""
    folder = work / f"fewer-{name}"
    if not (folder / f"{name}.npz").is_file():
        folder.mkdir(exist_ok=True)
        found = read_named(name, data_folder, True, None)
        parts = [("train", found.train_images, found.train_labels), ("test", found.test_images, found.test_labels)]
        arrays = {}
        for (part, images, labels), step in zip(parts, EVERY[name]):
            arrays |= {f"x_{part}": images[::step].permute(0, 2, 3, 1).numpy(), f"y_{part}": labels[::step].numpy()}
        np.savez(folder / f"{name}.npz", **arrays)
    return str(folder)


def train(name, method, seed, work, **settings):
    """The run folder of one network, trained now or before."""
    folder = work / "-".join([name, method, str(seed), *(["qat"] if settings.get("qat") else [])])
    if not (folder / "result.json").is_file():
        quiet = Console(stderr=True, quiet=True)
        if (folder / "last.ckpt").is_file():
            resume(folder, quiet)
        else:
            config = {**CASES[name], "method": method, "seed": seed, "accelerator": "cpu", "threads": 1, **settings}
            fit(TrainConfig(**config, out=str(folder)), quiet)
    return folder


def images_of(folder):
    """256 training images as they are in evaluation, and the test images with their labels."""
    config = TrainConfig.load(folder / "config.yaml")
    data = dataclasses.replace(config, augmentation="none").open_data()
    images = torch.cat([images for images, _ in training_loader(data, 64, seed=0, epoch=lambda: 0)][:4])
    return images, list(evaluation_loader(data))


@torch.no_grad()
def judged(network, path, test):
    """Output error relative to the network's, and accuracy, with sums that do not overflow."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    received = torch.cat([torch.from_numpy(session.run(None, {name: images.numpy()})[0]) for images, _ in test])
    expected, labels = torch.cat([network(images) for images, _ in test]), torch.cat([labels for _, labels in test])
    error = float((received - expected).norm() / expected.norm())
    return {"error": error, "accuracy_int8": float((received.argmax(1) == labels).double().mean())}


def measure(names, methods, seeds, work, out, data_folder, qat=False):
    """Train and quantize what has no result yet; write after each, and return all that there is."""
    report = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"results": []}
    done = {(each["data"], each["method"], each["seed"], each["recipe"]) for each in report["results"]}
    cases = [(seed, name, method, RECIPES) for seed in seeds for name in names for method in methods]
    if qat:
        cases = [(seed, name, method, QAT) for seed, name, method, _ in cases if method in QAT_METHODS]
    console = Console(stderr=True)
    for seed, name, method, recipes in cases:
        left = [recipe for recipe in recipes if (name, method, seed, recipe) not in done]
        if not left:
            continue
        console.print(f"{name}, {method}, seed {seed}: training", soft_wrap=True)
        images = shortened(name, work, data_folder) if name in EVERY else data_folder
        folder = train(name, method, seed, work, data_folder=images, qat=qat)
        network, _ = open_network(folder)
        calibration, test = images_of(folder)
        for recipe in left:
            with tempfile.TemporaryDirectory() as place:
                path = pathlib.Path(place, "net.onnx")
                found = quantize(network, path, calibration, evaluation=test, **recipes[recipe])
                exact = judged(network, path, test)
            result = {"data": name, "method": method, "seed": seed, "recipe": recipe, **exact}
            result |= {"accuracy_float": found.accuracy_before, "epochs": CASES[name]["epochs"]}
            result |= {"here": {"error": found.error, "accuracy_int8": found.accuracy}}
            report["results"].append({**result, "in_float": list(found.float_layers)})
            console.print(f"  {recipe}: error {100 * exact['error']:.2f} %", soft_wrap=True)
        write_json(out, {"machine": machine(), "versions": versions(), "results": report["results"]}, indent=1)
    return report


def table(results, name):
    """One data set's table in Markdown: a row for each method; medians over seeds, in brackets the span."""
    lines = ["| method | seeds | float | " + " | ".join(f"{each}: error | here | accuracy" for each in RECIPES) + " |"]
    lines.append("|---" * (3 + 3 * len(RECIPES)) + "|")
    for method in METHODS:
        rows = [each for each in results if (each["data"], each["method"]) == (name, method)]
        rows = [each for each in rows if each["recipe"] in RECIPES]
        if not rows:
            continue
        cells = [method, str(len({each["seed"] for each in rows}))]
        cells.append(f"{100 * statistics.median(each['accuracy_float'] for each in rows):.2f} %")
        for recipe in RECIPES:
            own = [each for each in rows if each["recipe"] == recipe]
            changes = [100 * (each["accuracy_int8"] - each["accuracy_float"]) for each in own]
            cells.append(span([each["error"] for each in own]) if own else "")
            cells.append(span([each["here"]["error"] for each in own]) if own else "")
            cells.append(f"{min(changes):+.2f} … {max(changes):+.2f}" if own else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def qat_table(results, name):
    """Quantized per channel after plain training and after training through the rounding; nothing where that is not."""
    lines = ["| method | seeds | trained | float | int8 | change | error |", "|---" * 7 + "|"]
    for method in METHODS:
        found = {each["seed"]: each for each in results if is_of(each, name, method, "qat")}
        before = {each["seed"]: each for each in results if is_of(each, name, method, "per channel")}
        for how, rows in (("plainly", [before[seed] for seed in found]), ("`--qat`", list(found.values()))):
            if rows:
                accuracies = [[100 * each[f"accuracy_{kind}"] for each in rows] for kind in ("float", "int8")]
                cells = [method, str(len(rows)), how, *(f"{statistics.mean(each):.2f} %" for each in accuracies)]
                cells.append(f"{statistics.mean(accuracies[1]) - statistics.mean(accuracies[0]):+.2f}")
                lines.append("| " + " | ".join([*cells, span([each["error"] for each in rows])]) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def is_of(result, *key):
    """Is it of this data set, method and recipe?"""
    return (result["data"], result["method"], result["recipe"]) == key


def span(shares):
    """Median, least and largest, in percent."""
    return f"{100 * statistics.median(shares):.1f} ({100 * min(shares):.1f}–{100 * max(shares):.1f})"


def page(report, text):
    """The document with its tables in their place."""
    before, _, rest = text.partition(BEGIN)
    tables = []
    for name, epochs in {each["data"]: each["epochs"] for each in report["results"]}.items():
        said = f"{CASES[name]['architecture']} on {name}, {epochs} epochs"
        if name in EVERY:
            width, steps = CASES[name]["architecture_args"]["width"], EVERY[name]
            said = f"**Shortened**: {said}, {width} channels at first, one training image in {steps[0]} and one test "
            said += f"image in {steps[1]}"
        tables.append(f"\n{said}:\n\n{table(report['results'], name)}")
        if trained := qat_table(report["results"], name):
            tables.append(f"\nPer channel, trained plainly and through the rounding, means over seeds:\n\n{trained}")
    return before + BEGIN + "".join(tables) + "\n" + END + rest.partition(END)[2]


def main(arguments=None):
    """Measure, write the results and the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(CASES), default=["digits"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--qat", action="store_true", help=f"train through the rounding: {', '.join(QAT_METHODS)}")
    parser.add_argument("--data-folder", default="data", help="where data sets lie (default: data)")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/int8"), help="where runs are kept")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="the results")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, help="the document")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the document")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if not options.table:
        options.work.mkdir(parents=True, exist_ok=True)
        where = {"data_folder": options.data_folder, "qat": options.qat}
        measure(options.data, options.methods, options.seeds, options.work, options.out, **where)
    report = json.loads(options.out.read_text(encoding="utf-8"))
    options.page.write_text(page(report, options.page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
