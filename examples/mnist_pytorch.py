"""The MNIST demo of the DO-Conv paper's repository: three convolutions, plain or over-parameterized.

    python examples/mnist_pytorch.py --layer both --seeds 5 --data mnist.npz --out results.json

Conv(1→16→16→10, 3×3, stride 2, padding 1), a ReLU after each, global average pooling; SGD at 0.01 with momentum 0.9 on
batches of 32, trained on five sixths of the training images (50 000), scored after the last epoch on the others. A seed
gives both layers the same initial weights and the same order of the images. mnist.npz is Keras's file: x_train of shape
(images, 28, 28) with values from 0 to 255, y_train of shape (images,).
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import statistics
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import foldconv
from foldconv._files import atomic_path
from foldconv.bench.machine import machine, versions
from foldconv.train._statistics import paired_difference


def load(path):
    """Training images and labels, then held-out images and labels; pixels in [0, 1], shape (images, 1, 28, 28)."""
    with open(path, "rb") as raw, np.load(raw) as file:  # NumPy would leave a damaged file open
        if not {"x_train", "y_train"} <= set(file):
            raise ValueError(f"{path}: expected arrays x_train and y_train, received {', '.join(file)}")
        x, y = file["x_train"], file["y_train"]
    if x.ndim != 3 or len(x) < 2 or y.shape != x.shape[:1] or x.dtype != np.uint8 or not set(y) <= set(range(10)):
        expected = "x_train (images ≥ 2, height, width) of bytes and y_train (images,) of digits"
        raise ValueError(f"{path}: expected {expected}, received {x.shape} of {x.dtype} and {y.shape} of {y.dtype}")
    images, labels = torch.from_numpy(x).unsqueeze(1) / 255, torch.from_numpy(y).long()
    split = len(images) * 5 // 6
    return images[:split], labels[:split], images[split:], labels[split:]


def network(layer, seed):
    torch.manual_seed(seed)
    parts = []
    for channels, filters in [(1, 16), (16, 16), (16, 10)]:
        parts += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), nn.ReLU()]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return foldconv.expand(net, layer) if layer != "conv" else net


def train(net, images, labels, seed, epochs, advance):
    order_of = torch.Generator().manual_seed(seed)  # of its own: what a layer draws must not change the order
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order_of).split(32):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        advance()


@torch.no_grad()
def accuracy(net, images, labels):
    """Percent of the images that the network, folded to plain convolutions, classifies right."""
    return 100 * (foldconv.fold(net.eval())(images).argmax(1) == labels).sum().item() / len(labels)


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


def run(layers, seeds, data, epochs, out=None):
    x, y, held_x, held_y = data
    report = {"epochs": epochs, "images": len(x), "held_out": len(held_x), "machine": machine(), "versions": versions()}
    report |= {"seeds": [], "accuracies": {name: [] for name in layers}}
    start = time.perf_counter()
    with progress_bar(seeds * len(layers) * epochs) as advance:
        for seed in range(seeds):
            for name in layers:
                net = network(name, seed)
                train(net, x, y, seed, epochs, advance)
                report["accuracies"][name].append(accuracy(net, held_x, held_y))
            report["seeds"].append(seed)
            report |= {"summary": summarize(report["accuracies"]), "seconds": round(time.perf_counter() - start, 1)}
            if out is not None:  # after each seed: whoever interrupts a long run keeps what it found
                with atomic_path(out) as temporary:
                    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", choices=["conv", "doconv", "both"], default="both")
    parser.add_argument("--seeds", type=int, default=5, help="how many; the first is 0 (default: %(default)s)")
    parser.add_argument("--data", required=True, metavar="FILE.npz")
    parser.add_argument("--epochs", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--out", metavar="FILE.json", help="also write all figures there")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.epochs) < 1:
        parser.error(f"--seeds, --epochs: expected at least 1, received {options.seeds} and {options.epochs}")
    if options.out and not Path(options.out).absolute().parent.is_dir():
        parser.error(f"--out: no such folder to write into: {Path(options.out).parent}")
    try:
        data = load(options.data)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        parser.error(f"--data: expected an .npz file: {error}")
    layers = ["conv", "doconv"] if options.layer == "both" else [options.layer]
    report = run(layers, options.seeds, data, options.epochs, options.out)
    print(table(report))
    return report


if __name__ == "__main__":
    main()
