"""What a training step costs with each method, relative to the plain network, in one process with paired steps.

    python benchmarks/training_step.py resnet18 --batch 8 --size 224 --methods doconv,orepa --steps 10 --out steps.json

Networks come from torchvision. Each round runs one step of every network, so that a slow moment of the machine hits
all alike; ratios are medians over the rounds of a step's time divided by the plain network's in the same round. The
JSON holds the machine, the versions and every sample.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time

import torch
import torchvision

import foldconv
from foldconv._files import atomic_path

WARM_UP = 2


def prepare(network, method):
    torch.manual_seed(0)
    net = torchvision.models.get_model(network)
    if method != "plain":
        net = foldconv.expand(net, method)
    return net.train(), torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)


def step(net, optimizer, images, labels):
    begin = time.perf_counter()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - begin


def measure(network, batch, size, methods, steps):
    """Seconds per step of each network, round by round."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    networks = {method: prepare(network, method) for method in ["plain", *methods]}
    samples = {method: [] for method in networks}
    for number in range(WARM_UP + steps):
        for method, (net, optimizer) in networks.items():
            seconds = step(net, optimizer, images, labels)
            if number >= WARM_UP:
                samples[method].append(seconds)
        print(f"\rround {number + 1} of {WARM_UP + steps}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return samples


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--methods", default="doconv,orepa,dbb")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out")
    options = parser.parse_args(arguments)
    samples = measure(options.network, options.batch, options.size, options.methods.split(","), options.steps)
    ratios = {m: statistics.median(a / b for a, b in zip(s, samples["plain"])) for m, s in samples.items()}
    for method, ratio in ratios.items():
        print(f"{method:10}  {statistics.median(samples[method]) * 1e3:8.0f} ms  {ratio:.2f}×")
    if options.out:
        report = {
            "case": vars(options),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "versions": {
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "foldconv": foldconv.__version__,
            },
            "ratios": ratios,
            "seconds": samples,
        }
        with atomic_path(options.out) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return ratios


if __name__ == "__main__":
    main()
