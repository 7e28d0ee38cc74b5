"""Run the experiments of docs/evidence.md with `foldconv compare`, and write that page from what they gave.

    python docs/evidence.py run mnist --data mnist.npz      train what is missing, keep what came out, write the page
    python docs/evidence.py                                 write the page from what is kept

Training goes on where it was stopped (Ctrl-C, or `timeout --signal INT 550 python docs/evidence.py run ...` where a
machine is lent by the piece). Runs are in runs/evidence/NAME; what is kept of them, in docs/evidence/NAME, is what
compare wrote: report.json, results.csv and the pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from foldconv.lab.compare.markdown import accuracy_table, cost_table, machines
from foldconv.methods import list_methods

ROOT = Path(__file__).parent.parent
PAGE, KEPT = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence"
FILES = ("report.json", "results.csv", "curves.png", "differences.png")
HEAD = """# Evidence

Does a foldable convolution make a network more accurate? Each experiment here trains the plain network and the expanded
ones with the same seeds and the same order of images, folds them, and scores the folded networks after the last epoch;
nothing is chosen by the test images. A difference is paired by seed, with Student's 95 % interval; where several
methods are compared with one plain network, *resolved among all* is by Holm's rule. This page is written by
`python docs/evidence.py` from the results in `docs/evidence`.
"""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is compared, and what others reported."""

    title: str
    methods: tuple[str, ...]
    seeds: int
    config: str
    data: str
    about: str
    published: str = ""
    circumstances: str = ""
    """Of the runs that are kept, where no file tells."""

    def command(self, out: str, data: str | None = None) -> list[str]:
        """The comparison's command line."""
        words = ["foldconv", "compare", "--methods", ",".join(self.methods), "--seeds", str(self.seeds)]
        return [*words, "--config", self.config, "--data", data or self.data, "--out", out]


CIFAR_METHODS = ("plain", "doconv", "orepa", "dbb", "repvgg", "expandnet")
EXPERIMENTS = {
    "mnist": Experiment(
        "MNIST, DO-Conv's demonstration",
        ("plain", "doconv"),
        20,
        "mnist-pytorch",
        "mnist.npz",
        "Three convolutions of 3×3 (3,930 parameters), 15 epochs on the first 50,000 training images, scored on the "
        "last 10,000.",
        "The authors' README: 95.156 → 95.674 (+0.52).",
        "The machine did other work as well, as the range shows: these times say little.",
    ),
    "digits": Experiment(
        "Digits, every method",
        ("plain", *(name for name in list_methods() if name != "dilated")),
        10,
        "digits",
        "digits",
        "The small residual network that `foldconv train` trains by default, on 1,437 images of 8×8 pixels and tested "
        "on 360: so few that one image is 0.28 points, and so easy that little is left to gain. This is a check of all "
        "methods by one protocol, no reason to choose one. (`dilated` applies to large depthwise kernels, of which "
        "this network has none.)",
        circumstances="The machine did other work as well: these times say little.",
    ),
    "cifar10-resnet20": Experiment(
        "CIFAR-10, ResNet-20",
        CIFAR_METHODS,
        5,
        "cifar10-resnet20",
        "cifar10.npz",
        "The residual network of 20 layers and the recipe of its paper, 164 epochs.",
        "He et al. (CVPR 2016, table 6) report 91.25 % for the plain convolutions.",
    ),
    "cifar10-plain20": Experiment(
        "CIFAR-10, Plain-20",
        CIFAR_METHODS,
        5,
        "cifar/plain20",
        "cifar10.npz",
        "ResNet-20 without its shortcuts, by the same recipe: the kind of network for which RepVGG was made.",
    ),
    "expandnets-3x3": Experiment(
        "CIFAR-10, ExpandNets' SmallNet with 3×3 kernels",
        ("plain", "expandnet"),
        5,
        "expandnets/3x3",
        "cifar10.npz",
        "Three convolutions to 8, 16 and 32 channels, 150 epochs.",
        "The authors' README: 73.32 ± 0.20 → 73.96 ± 0.30, of the epoch that was best on the test images.",
    ),
    "expandnets-7x7": Experiment(
        "CIFAR-10, ExpandNets' SmallNet with 7×7 kernels",
        ("plain", "expandnet:chain=CK"),
        5,
        "expandnets/7x7",
        "cifar10.npz",
        "The same with 7×7 kernels, each of which is trained as three of 3×3.",
        "The authors' README: 78.63 ± 0.41 → 80.27 ± 0.24, of the epoch that was best on the test images.",
    ),
}


def run(name: str, data: str | None, extra: list[str]) -> None:
    """Train what is missing of an experiment and keep what compare wrote."""
    out = ROOT / "runs" / "evidence" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    words = EXPERIMENTS[name].command(str(out), data)
    subprocess.run([sys.executable, "-m", *words, *extra], cwd=ROOT, check=True)
    (KEPT / name).mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(out / file, KEPT / name / file)


def page() -> str:
    """The whole page, from the results that are kept."""
    there = {name: KEPT / name / "report.json" for name in EXPERIMENTS}
    done = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in there.items() if path.is_file()}
    parts = [HEAD.rstrip()]
    parts += [f"## {EXPERIMENTS[name].title}\n\n{section(name, values)}" for name, values in done.items()]
    missing = [name for name in EXPERIMENTS if name not in done]
    if missing:
        lines = [
            "## Not measured yet",
            "They need a GPU, or much time. Each is a command that can be stopped and goes on:",
        ]
        lines += [
            "\n".join(f"    python docs/evidence.py run {name} --data {_file(EXPERIMENTS[name])}" for name in missing)
        ]
        known = [f"{EXPERIMENTS[n].title}. {EXPERIMENTS[n].about} {EXPERIMENTS[n].published}" for n in missing]
        lines.append("\n".join(f"- {text.rstrip()}" for text in known))
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts).rstrip() + "\n"


def _file(experiment: Experiment) -> str:
    return experiment.data.partition(":")[0]


def section(name: str, values: dict) -> str:
    """One experiment: what, the command, what came out."""
    experiment = EXPERIMENTS[name]
    command = shlex.join(experiment.command(name))
    parts = [experiment.about, f"    {command}", accuracy_table(values), verdict(values), experiment.published]
    parts += [f"![](evidence/{name}/differences.png)", f"![](evidence/{name}/curves.png)"]
    parts += ["Time and memory of training, beside the plain network's run with the same seed:", cost_table(values)]
    if values["runs_at_once"] > 1:
        parts.append(
            f"Up to {values['runs_at_once']} runs at once shared the machine. {experiment.circumstances}".strip()
        )
    parts.append(machines(values) + f"\n- accuracy of each run: [results.csv](evidence/{name}/results.csv)")
    return "\n\n".join(part for part in parts if part)


def verdict(values: dict) -> str:
    """What the intervals say, and no more."""
    seeds = f"{len(values['seeds'])} seeds"
    found = {name: method["difference"] for name, method in values["methods"].items() if method["difference"]}
    better = [name for name, each in found.items() if each["resolved_among_all"] and each["mean"] > 0]
    worse = [name for name, each in found.items() if each["resolved_among_all"] and each["mean"] < 0]
    open_ = [name for name in found if name not in better + worse]
    words = [
        f"{label} than {values['baseline']} with {seeds}: {', '.join(names)}."
        for label, names in (("More accurate", better), ("Less accurate", worse))
        if names
    ]
    if open_:
        words.append(f"Neither shown with {seeds}: {', '.join(open_)}.")
    return " ".join(words)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["run"])
    parser.add_argument("name", nargs="?", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--data", metavar="FILE", help="where the experiment's .npz file is, without its options")
    options, extra = parser.parse_known_args()
    if options.action:
        if options.name is None:
            parser.error(f"which one? {', '.join(EXPERIMENTS)}")
        run(options.name, options.data, extra)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
