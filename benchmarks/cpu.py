"""Everything that is said of speed on a CPU, measured anew: results, picture and table by one command.

    python benchmarks/cpu.py

Each case is a run of `foldconv bench` in CPU time of the process, on one thread, all networks by turns; together they
take about ten minutes. Written are benchmarks/results/cpu.json (what the cases found, one after the other, which
`foldconv bench plot` reads) and docs/overhead.png; printed is the table, each figure beside what it should reach.
`--only` measures some cases and leaves the others' results as they are.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import torch
import training_step

from foldconv.errors import UnsupportedError, unknown
from foldconv.files.atomic import write_json
from foldconv.lab.bench.config import BenchConfig
from foldconv.lab.bench.measure import FORMAT
from foldconv.lab.bench.plot import plot
from foldconv.lab.cli._bench import progress
from foldconv.lab.machine import machine, versions

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "cpu.json"
PICTURE = ROOT / "docs" / "overhead.png"
RESNET, MOBILE, CIFAR = "torchvision/resnet18", "timm/mobilenetv3_small_100", "cifar_resnet20"
SIX = ("doconv", "orepa", "repvgg", "acnet", "mobileone", "dbb")
CASES = {
    "resnet18": BenchConfig(RESNET, (2, 8, 32, 8), (64, 64, 64, 224), SIX[:3], steps=16),
    "resnet18-kept": BenchConfig(RESNET, (8,), (224,), SIX, ("kept",)),
    # What keeps the caches busy for long is measured apart: some percent of a step need many rounds to be seen.
    "cifar": BenchConfig(CIFAR, (32,), (32,), SIX[:3], steps=60),
    "cifar-branches": BenchConfig(CIFAR, (32,), (32,), SIX[3:], steps=16),
    "cifar-kept": BenchConfig(CIFAR, (32,), (32,), SIX, ("kept",)),
    "digits": BenchConfig("digits_resnet", (32,), (8,), SIX[:3], steps=150),
    "mnist": BenchConfig("mnist_demo", (32,), (28,), SIX[:3], steps=150),
    "mobilenet": BenchConfig(MOBILE, (8,), (224,), ("mobileone",), steps=16),
    "mnist-loop": BenchConfig("mnist_demo", (32,), (28,), ("doconv",), ("loop",), 3),
    "cifar-loop": BenchConfig(CIFAR, (128,), (32,), ("doconv",), ("loop",), 1),
    "fold": BenchConfig("torchvision/resnet50", (1,), (64,), ("doconv", "orepa", "dbb", "expandnet"), ("fold",), 2),
}
TRAIN = "foldconv train"
# What is measured, network, batch, size, contestant: ratio to the plain network (the bare loop); folding: seconds.
REACH = {
    ("step", RESNET, 32, 64, "doconv"): 1.12,
    ("step", RESNET, 8, 224, "doconv"): 1.04,
    ("step", "mnist_demo", 32, 28, "doconv"): 1.12,
    ("step", "digits_resnet", 32, 8, "doconv"): 1.12,
    ("step", CIFAR, 32, 32, "doconv"): 1.05,
    ("step", RESNET, 8, 224, "orepa"): 1.45,
    ("step", CIFAR, 32, 32, "orepa"): 1.10,
    ("step", CIFAR, 32, 32, "repvgg"): 1.40,
    ("step", RESNET, 8, 224, "repvgg"): 1.20,
    ("kept", CIFAR, 32, 32, "repvgg"): 1.05,
    ("kept", RESNET, 8, 224, "repvgg"): 1.15,
    ("kept", CIFAR, 32, 32, "acnet"): 1.4,
    ("kept", CIFAR, 32, 32, "mobileone"): 1.6,
    ("kept", CIFAR, 32, 32, "dbb"): 2.2,
    ("loop", "mnist_demo", 32, 28, TRAIN): 1.25,
    ("loop", CIFAR, 128, 32, TRAIN): 1.05,
    ("fold", "torchvision/resnet50", 1, 64, "doconv"): 0.37,
    ("fold", "torchvision/resnet50", 1, 64, "orepa"): 0.73,
    ("fold", "torchvision/resnet50", 1, 64, "dbb"): 0.70,
    ("fold", "torchvision/resnet50", 1, 64, "expandnet"): 2.0,
}
SAID = {"step": "training step", "kept": "bytes kept", "loop": "epoch", "fold": "fold, checked"}


def measure(cases, out, rounds=None):
    """Measure the cases by name, write what was found after each, and return all that the file holds."""
    report = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    report = report if report.get("format") == FORMAT else {"results": [], "commands": {}}
    torch.set_num_threads(1)
    for name, config in cases.items():
        found = training_step.run(dataclasses.replace(config, clock="cpu", steps=rounds or config.steps))
        kept = [result for result in report["results"] if result["case"] != name]
        results = kept + [{"case": name, **result} for result in found["results"]]
        order = list(CASES)
        report = {
            "format": FORMAT,
            "command": "python benchmarks/cpu.py",
            "commands": report["commands"] | {name: found["command"]},
            "machine": machine(),
            "versions": versions(),
            "results": sorted(results, key=lambda result: order.index(result["case"])),
        }
        write_json(out, report, indent=1)
    return report


def table(report):
    """Every figure that was measured, in Markdown, with what it should reach where that was said."""
    lines = ["| measured | network | | | to reach |", "|---|---|---|---|---|"]
    for result in report["results"]:
        what, network = result["what"], result["network"]
        figures = result["medians"] if what == "fold" else {n: r["median"] for n, r in result["ratios"].items()}
        for name, figure in figures.items():
            if name in ("plain", "bare loop"):
                continue
            wanted = REACH.get((what, network, result["batch"], result["size"], name))
            size = "" if what == "fold" else f" {result['batch']}×{result['size']}²"
            shown = f"{figure:.2f} s" if what == "fold" else f"{figure:.3f}"
            verdict = "" if wanted is None else f"≤ {wanted:g}{'' if figure <= wanted else ' (not yet)'}"
            lines.append(f"| {SAID[what]} | {network}{size} | {name} | {shown} | {verdict} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="CASE,...", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every case, instead of its own number")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, metavar="FILE.json")
    parser.add_argument("--picture", type=pathlib.Path, default=PICTURE, metavar="FILE.png")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(CASES)
    for name in names:
        if name not in CASES:
            parser.error(f"--only: {unknown('case', name, CASES)}")
    try:
        report = measure({name: CASES[name] for name in names}, options.out, options.rounds)
        if any((result["what"], result["network"]) == ("step", RESNET) for result in report["results"]):
            plot([options.out], options.picture, RESNET)
    except (UnsupportedError, OSError) as error:
        return f"cpu.py: {error}"
    finally:
        progress("")
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
