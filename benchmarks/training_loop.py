"""An epoch of `foldconv train` beside an epoch of a bare loop in PyTorch, in CPU time of the process.

    python benchmarks/training_loop.py mnist --rounds 5 --out results.json
    python benchmarks/training_loop.py cifar --images 2560 --rounds 5

Both train the same plain network with the same optimizer on the same images (random ones: time does not depend on
them) in batches of the same size, and evaluate the test images, a fifth as many, in batches of 256. They take turns in
one process on one thread; the ratio is the median of the rounds'. The bare loop is that of examples/mnist_pytorch.py:
it holds the images as float tensors, and records nothing.

An epoch of `foldconv train` is all of it: what the bare loop does, loading, normalizing and augmenting the images as
the config says, the schedule, looking at each loss, training accuracy, the loss on the test images, the line on the
console, the row in metrics.csv and the checkpoint. What a run does once (start, fold, verify) is in neither.
"""

import argparse
import dataclasses
import io
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from rich.console import Console
from torch import nn

from foldconv.files.atomic import write_json
from foldconv.lab.data.loaders import EVALUATION_BATCH
from foldconv.lab.machine import machine, versions
from foldconv.lab.run import RunFolder
from foldconv.lab.train import TrainConfig
from foldconv.lab.train.checkpoint import build
from foldconv.lab.train.devices import launch, quiet_lightning
from foldconv.lab.train.loop import Training
from foldconv.lab.train.records import Records

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
CASES = {"mnist": ("mnist-pytorch.yaml", (28, 28)), "cifar": ("cifar10-resnet20.yaml", (32, 32, 3))}


def bare(network, config, images, labels, tests, answers):
    """A function that trains and evaluates for one epoch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=config.lr, momentum=config.momentum)

    def epoch():
        network.train()
        for batch in torch.randperm(len(images)).split(config.batch_size):
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            batches = zip(tests.split(EVALUATION_BATCH), answers.split(EVALUATION_BATCH))
            return sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)

    return epoch


def seconds(epoch):
    begin = time.process_time()
    epoch()
    return time.process_time() - begin


def measure(case, count, rounds, folder):
    """What was measured, with CPU seconds of each round; `folder` is for files on the way."""
    name, size = CASES[case]
    random = np.random.default_rng(0)
    parts = {"train": count, "test": max(count // 5, 1)}
    arrays = {f"x_{part}": random.integers(256, size=(n, *size), dtype=np.uint8) for part, n in parts.items()}
    arrays |= {f"y_{part}": np.arange(n) % 10 for part, n in parts.items()}
    np.savez(folder / "images.npz", **arrays)
    config = TrainConfig.load(CONFIGS / name)
    config = dataclasses.replace(
        config, method="plain", data=str(folder / "images.npz"), holdout=False, accelerator="cpu", epochs=rounds + 1
    )
    data = config.open_data()
    torch.manual_seed(0)
    network, _ = build(config, data)
    scaled = [(images.float() / 255, labels) for images, labels in (data.train.tensors, data.test.tensors)]
    loops = {"bare": bare(network, config, *scaled[0], *scaled[1])}
    network, description = build(config, data)
    with quiet_lightning():
        run = RunFolder(folder)
        training = Training(network, config, data, launch(config), run.checkpoint)
        loops["foldconv"] = Records(training, description, run, Console(file=io.StringIO())).epoch
        found = {loop: [] for loop in loops}
        for round in range(rounds + 1):
            for loop, epoch in loops.items():
                taken = seconds(epoch)
                if round:  # the first one warms up
                    found[loop].append(round_to(taken))
    ratio = statistics.median(ours / plain for plain, ours in zip(*found.values()))
    return {
        "case": case,
        "config": name,
        "images": parts,
        "batch_size": config.batch_size,
        "cpu_seconds": found,
        "ratio": round_to(ratio),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions(("torch", "lightning", "numpy")),
    }


def round_to(number):
    return float(f"{number:.4g}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--images", type=int, default=50000, metavar="N", help="for training (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="epochs of each (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE.json", help="also write all figures there")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.images < 10:
        parser.error("--rounds, --images: expected at least 1 and 10")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = measure(options.case, options.images, options.rounds, pathlib.Path(folder))
    finally:
        torch.set_num_threads(before)
    if options.out:
        write_json(options.out, report, indent=1)
    bare, ours = (statistics.median(each) for each in report["cpu_seconds"].values())
    print(f"{report['case']}: bare {bare:.2f} s, foldconv train {ours:.2f} s of CPU time, ratio {report['ratio']:.3f}")
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
