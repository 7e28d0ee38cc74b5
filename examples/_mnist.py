"""What the MNIST demos share: the file of images, the command line, a bar, a table and a file of figures; no framework.

A demo gives `main` four functions: load(path) for training images, their labels, held-out images, their labels;
network(layer, seed); train(net, images, labels, seed, epochs, advance); accuracy(net, images, labels).
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import statistics
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

from foldconv.files.atomic import write_json
from foldconv.lab.compare.statistics import paired_difference
from foldconv.lab.machine import machine, versions


def load(path, *parts):
    """Images and labels of each part, "train" or "test"; pixels in [0, 1], shape (images, height, width)."""
    names = [f"{array}_{part}" for part in parts for array in "xy"]
    with open(path, "rb") as raw, np.load(raw) as file:  # NumPy would leave a damaged file open
        if not set(names) <= set(file):
            raise ValueError(f"{path}: expected arrays {', '.join(names)}, received {', '.join(file)}")
        arrays = [file[name] for name in names]
    for part, x, y in zip(parts, arrays[::2], arrays[1::2]):
        if x.ndim != 3 or len(x) < 2 or y.shape != x.shape[:1] or x.dtype != np.uint8 or not set(y) <= set(range(10)):
            expected = f"x_{part} (images ≥ 2, height, width) of bytes and y_{part} (images,) of digits"
            raise ValueError(f"{path}: expected {expected}, received {x.shape} of {x.dtype} and {y.shape} of {y.dtype}")
    return [array.astype(np.float32) / 255 if array.ndim == 3 else array.astype(np.int64) for array in arrays]


def orders(images, seed, epochs):
    """For each epoch the order of the images: from the seed alone, whatever a framework draws in between."""
    random = np.random.default_rng(seed)
    return (random.permutation(images) for _ in range(epochs))


@contextlib.contextmanager
def progress_bar(total):
    """Give a function to call after each epoch; it moves a bar, or without rich a line, on a terminal's stderr."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich import console, progress

        with progress.Progress(console=console.Console(stderr=True)) as bar:
            yield functools.partial(bar.advance, bar.add_task("epochs", total=total))
    else:
        done = iter(range(1, total + 1))
        show = functools.partial(print, file=sys.stderr, flush=True) if sys.stderr.isatty() else lambda *_, **__: None
        yield lambda: show(f"\repoch {next(done)} of {total}", end="")
        show()


def summarize(accuracies):
    """Mean and standard deviation per layer, and with both layers and two seeds the paired difference."""
    std = {name: statistics.stdev(values) if len(values) > 1 else None for name, values in accuracies.items()}
    summary = {name: {"mean": statistics.fmean(values), "std": std[name]} for name, values in accuracies.items()}
    if len(accuracies) == 2 and len(accuracies["conv"]) > 1:
        summary["difference"] = vars(paired_difference(accuracies["conv"], accuracies["doconv"]))
    return summary


def table(report):
    lines = [f"| layer | accuracy, mean of {len(report['seeds'])} seeds (%) | standard deviation |", "|---|---|---|"]
    for name in report["accuracies"]:
        mean, std = report["summary"][name].values()
        lines.append(f"| {name} | {mean:.3f} | {'–' if std is None else f'{std:.3f}'} |")
    if difference := report["summary"].get("difference"):
        text = "\ndoconv - conv, paired by seed: {mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
        lines.append(text.format(**difference))
    return "\n".join(lines)


def parse(arguments, description, epochs):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--layer", choices=["conv", "doconv", "both"], default="both")
    parser.add_argument("--seeds", type=int, default=5, help="how many; the first is 0 (default: %(default)s)")
    parser.add_argument("--data", required=True, metavar="FILE.npz")
    parser.add_argument("--epochs", type=int, default=epochs, help="(default: %(default)s)")
    parser.add_argument("--out", metavar="FILE.json", help="also write all figures there")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.epochs) < 1:
        parser.error(f"--seeds, --epochs: expected at least 1, received {options.seeds} and {options.epochs}")
    if options.out and not Path(options.out).absolute().parent.is_dir():
        parser.error(f"--out: no such folder to write into: {Path(options.out).parent}")
    return parser, options


def threads_of(variable):
    """What an environment variable asks for; None where it leaves the number to the framework."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else None


def main(arguments, doc, functions, *, epochs, packages, threads):
    """Train and score, print the table, return the report.

    Args:
        arguments: of the command line; None: the process's own.
        doc: the demo's docstring, whose first line `--help` shows.
        functions: load, network, train and accuracy, see above.
        epochs: unless the command line says otherwise.
        packages: whose versions the report names.
        threads: how many the framework computes with, None where that is not known.
    """
    load, network, train, accuracy = functions
    parser, options = parse(arguments, doc.splitlines()[0], epochs)
    try:
        x, y, held_x, held_y = load(options.data)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        parser.error(f"--data: expected an .npz file: {error}")
    layers = ["conv", "doconv"] if options.layer == "both" else [options.layer]
    report = {"epochs": options.epochs, "images": len(x), "held_out": len(held_x)}
    report |= {"machine": machine() | {"threads": threads}, "versions": versions(packages)}
    report |= {"seeds": [], "accuracies": {name: [] for name in layers}}
    start = time.perf_counter()
    with progress_bar(options.seeds * len(layers) * options.epochs) as advance:
        for seed in range(options.seeds):
            for name in layers:
                net = network(name, seed)
                train(net, x, y, seed, options.epochs, advance)
                report["accuracies"][name].append(accuracy(net, held_x, held_y))
            report["seeds"].append(seed)
            report |= {"summary": summarize(report["accuracies"]), "seconds": round(time.perf_counter() - start, 1)}
            if options.out is not None:  # after each seed: whoever interrupts a long run keeps what it found
                write_json(options.out, report, indent=1)
    print(table(report))
    return report
