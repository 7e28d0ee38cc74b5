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

import numpy as np

from foldconv.lab.compare.markdown import accuracy_table, cost_table, machines
from foldconv.methods import list_methods

ROOT = Path(__file__).parent.parent
PAGE, KEPT = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence"
RUNS = ROOT / "runs" / "evidence"
FILES = ("report.json", "results.csv", "curves.png", "differences.png")
HEAD = """# Evidence

Does a foldable convolution make a network more accurate? Each experiment here trains the plain network and the expanded
ones with the same seeds and the same order of images, folds them, and scores the folded networks after the last epoch;
nothing is chosen by the test images. A difference is paired by seed, with Student's 95 % interval; where several
methods are compared with one plain network, *resolved among all* is by Holm's rule. This page is written by
`python docs/evidence.py` from the results in `docs/evidence`.
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """Which part of a data set (.npz in Keras' layout) is trained and tested on."""

    train: int
    """The first so many training images, of those that are taken."""
    test_step: int
    """Every so many-th test image."""
    train_step: int = 1
    """Every so many-th training image: a file may hold them in the order of their classes."""
    noise: float = 0.0
    """Share of the training labels that are drawn anew, from all classes alike; the same ones in all runs."""

    def write(self, source: str, path: Path) -> None:
        """Cut the part out of a file."""
        with np.load(source) as file:
            images = file["x_train"][:: self.train_step][: self.train]
            labels = file["y_train"].reshape(-1)[:: self.train_step][: self.train].copy()
            arrays = {
                "x_test": file["x_test"][:: self.test_step],
                "y_test": file["y_test"].reshape(-1)[:: self.test_step],
            }
        generator = np.random.default_rng(0)
        new = generator.permutation(self.train)[: round(self.noise * self.train)]
        labels[new] = generator.integers(labels.max() + 1, size=len(new))
        np.savez(path, x_train=images, y_train=labels, **arrays)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is compared, and what others reported."""

    title: str
    methods: tuple[str, ...]
    seeds: int
    config: str
    data: str
    about: str
    images: str
    """What is trained and tested on, in as few words as tables have room for."""
    published: str = ""
    circumstances: str = ""
    """Of the runs that are kept, where no file tells."""
    part: Part | None = None
    """Of the data, where it is not all of them."""
    after: str = ""
    """Another experiment, with whose plain networks this one starts."""

    def command(self, out: str, data: str | None = None) -> list[str]:
        """The comparison's command line."""
        words = ["foldconv", "compare", "--methods", ",".join(self.methods), "--seeds", str(self.seeds)]
        return [*words, "--config", self.config, "--data", data or self.data, "--out", out]


SHARED = "The machine did other work as well: these times say little."
BRANCHES = ("plain", "doconv", "orepa", "repvgg", "acnet", "dbb", "expandnet")
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
        "MNIST",
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
        "digits",
        circumstances=SHARED,
    ),
    "mnist-small": Experiment(
        "A tenth of MNIST (shortened)",
        BRANCHES,
        5,
        "shortened/mnist",
        "mnist.npz",
        "Few images and few channels, where over-parameterization is said to help: a residual network of 8 layers with "
        "4, 8 and 16 channels, 6 epochs on the first 6,000 training images at 14×14 pixels, scored on every second "
        "test image.",
        "a tenth of MNIST",
        circumstances=SHARED,
        part=Part(6000, 2),
    ),
    "mnist-finetune": Experiment(
        "Expanding a trained network (shortened)",
        tuple(name for name in BRANCHES if name != "dbb"),
        5,
        "shortened/mnist-finetune",
        "mnist.npz",
        'What most users would do: take a trained plain network, expand it with `init="preserve"`, which does not '
        "change what it computes, and train on. The network and the images are those of a tenth of MNIST (residual, 8 "
        "layers, 4 to 16 channels; 6,000 training images of 14×14 pixels, every second test image). Run by run it "
        "starts from the plain network that `mnist-small` trained for 6 epochs with the same seed; `plain` is that "
        "network trained on as it is, with the same images, epochs and rates (3 epochs, from 0.02 down by a cosine). "
        "`dbb` costs several times as much as the others and was left out.",
        "a tenth of MNIST (fine-tuned)",
        circumstances=SHARED,
        part=Part(6000, 2),
        after="mnist-small",
    ),
    "mnist-noise": Experiment(
        "A tenth of MNIST, a fifth of its labels drawn anew (shortened)",
        BRANCHES,
        5,
        "shortened/mnist",
        "mnist.npz",
        "The first experiment on a tenth of MNIST with wrong labels among those that are trained on (1,200 of 6,000 "
        "are drawn from all ten classes, the same in all runs). The test labels are right.",
        "a tenth of MNIST (wrong labels)",
        circumstances=SHARED,
        part=Part(6000, 2, noise=0.2),
    ),
    "cifar10-small": Experiment(
        "A tenth of CIFAR-10 (shortened)",
        BRANCHES,
        5,
        "shortened/cifar10",
        "cifar10.npz",
        "A residual network of 8 layers with 8, 16 and 32 channels, 12 epochs on every tenth training image, "
        "scored on every fifth test image.",
        "a tenth of CIFAR-10",
        circumstances=SHARED,
        part=Part(5000, 5, train_step=10),
    ),
    "cifar10-finetune": Experiment(
        "Expanding a network trained on CIFAR-10 (shortened)",
        tuple(name for name in BRANCHES if name != "dbb"),
        5,
        "shortened/cifar10-finetune",
        "cifar10.npz",
        "The same question as on MNIST, where little is left to gain, of a network that has much: run by run from the "
        "plain network that `cifar10-small` trained for 12 epochs with the same seed, 6 epochs on, from 0.02 down by a "
        "cosine. `plain` is that network trained on as it is.",
        "a tenth of CIFAR-10 (fine-tuned)",
        circumstances=SHARED,
        part=Part(5000, 5, train_step=10),
        after="cifar10-small",
    ),
    "cifar10-resnet8": Experiment(
        "CIFAR-10, ResNet-8 (shortened)",
        BRANCHES,
        5,
        "shortened/cifar10-resnet8",
        "cifar10.npz",
        "The network of a tenth of CIFAR-10 (8 layers with 8, 16 and 32 channels) on all 50,000 training images, for 5 "
        "epochs, which are four times as many steps; scored on all test images.",
        "CIFAR-10 (ResNet-8)",
        circumstances=SHARED,
    ),
    "expandnets-3x3-small": Experiment(
        "A fifth of CIFAR-10, ExpandNets' SmallNet with 3×3 kernels (shortened)",
        BRANCHES,
        5,
        "shortened/expandnets-3x3",
        "cifar10.npz",
        "Three convolutions to 8, 16 and 32 channels by their authors' recipe, but for 20 epochs in the place of 150, "
        "on every fifth training image; scored on every second test image.",
        "a fifth of CIFAR-10 (3×3)",
        circumstances=SHARED,
        part=Part(10_000, 2, train_step=5),
    ),
    "expandnets-7x7-small": Experiment(
        "A fifth of CIFAR-10, ExpandNets' SmallNet with 7×7 kernels (shortened)",
        ("plain", "doconv", "orepa", "repvgg", "expandnet:chain=CK"),
        5,
        "shortened/expandnets-7x7",
        "cifar10.npz",
        "The same with 7×7 kernels; `expandnet` trains each as three of 3×3. `acnet` and `dbb` cost more "
        "than the others and were left out.",
        "a fifth of CIFAR-10 (7×7)",
        circumstances=SHARED,
        part=Part(10_000, 2, train_step=5),
    ),
    "cifar10-resnet20": Experiment(
        "CIFAR-10, ResNet-20",
        CIFAR_METHODS,
        5,
        "cifar10-resnet20",
        "cifar10.npz",
        "The residual network of 20 layers and the recipe of its paper, 164 epochs.",
        "CIFAR-10",
        "He et al. (CVPR 2016, table 6) report 91.25 % for the plain convolutions.",
    ),
    "cifar10-plain20": Experiment(
        "CIFAR-10, Plain-20",
        CIFAR_METHODS,
        5,
        "cifar/plain20",
        "cifar10.npz",
        "ResNet-20 without its shortcuts, by the same recipe: the kind of network for which RepVGG was made.",
        "CIFAR-10",
    ),
    "expandnets-3x3": Experiment(
        "CIFAR-10, ExpandNets' SmallNet with 3×3 kernels",
        ("plain", "expandnet"),
        5,
        "expandnets/3x3",
        "cifar10.npz",
        "Three convolutions to 8, 16 and 32 channels, 150 epochs.",
        "CIFAR-10",
        "The authors' README: 73.32 ± 0.20 → 73.96 ± 0.30, of the epoch that was best on the test images.",
    ),
    "expandnets-7x7": Experiment(
        "CIFAR-10, ExpandNets' SmallNet with 7×7 kernels",
        ("plain", "expandnet:chain=CK"),
        5,
        "expandnets/7x7",
        "cifar10.npz",
        "The same with 7×7 kernels, each of which is trained as three of 3×3.",
        "CIFAR-10",
        "The authors' README: 78.63 ± 0.41 → 80.27 ± 0.24, of the epoch that was best on the test images.",
    ),
}


def run(name: str, data: str | None, extra: list[str]) -> None:
    """Train what is missing of an experiment and keep what compare wrote."""
    experiment = EXPERIMENTS[name]
    if experiment.after:
        starts = EXPERIMENTS[experiment.after]
        done = list((RUNS / experiment.after / "plain").glob("seed-*/result.json"))
        if len(done) < starts.seeds:
            compare(experiment.after, dataclasses.replace(starts, methods=("plain",)), data, extra)
    compare(name, experiment, data, extra)
    (KEPT / name).mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(RUNS / name / file, KEPT / name / file)


def compare(name: str, experiment: Experiment, data: str | None, extra: list[str]) -> None:
    """Call `foldconv compare`, with the part of the data that the experiment is about."""
    RUNS.mkdir(parents=True, exist_ok=True)
    if experiment.part is not None:
        file = RUNS / f"{name}.npz"
        if not file.is_file():
            experiment.part.write(data or experiment.data, file)
        data = str(file.relative_to(ROOT))
    words = experiment.command(str((RUNS / name).relative_to(ROOT)), data)
    subprocess.run([sys.executable, "-m", *words, *extra], cwd=ROOT, check=True)


def page() -> str:
    """The whole page, from the results that are kept."""
    there = {name: KEPT / name / "report.json" for name in EXPERIMENTS}
    done = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in there.items() if path.is_file()}
    parts = [HEAD.rstrip(), overview(done)]
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


def overview(done: dict[str, dict]) -> str:
    """One table: each method's difference to the plain network in each experiment."""
    found: dict[str, dict[str, str]] = {}
    for name, values in done.items():
        for method, result in values["methods"].items():
            difference = result["difference"]
            if difference:
                mark = "**" if difference["resolved_among_all"] else ""
                found.setdefault(method, {})[name] = f"{mark}{difference['mean']:+.2f}{mark}"
    head = ["", *(EXPERIMENTS[name].images for name in done)]
    rows = [head, ["---"] * len(head), ["seeds", *(str(len(values["seeds"])) for values in done.values())]]
    rows += [[f"`{method}`", *(cells.get(name, "") for name in done)] for method, cells in found.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"Points of accuracy above the plain network; **bold** where they are *resolved among all*:\n\n{table}"


def _file(experiment: Experiment) -> str:
    return experiment.data.partition(":")[0]


def section(name: str, values: dict) -> str:
    """One experiment: what, the command, what came out."""
    experiment = EXPERIMENTS[name]
    command = shlex.join(experiment.command(name))
    if experiment.part is not None:
        command = f"python docs/evidence.py run {name} --data {experiment.data}"
    parts = [experiment.about, f"    {command}", accuracy_table(values), verdict(values), experiment.published]
    parts += [f"![](evidence/{name}/differences.png)", f"![](evidence/{name}/curves.png)"]
    parts += ["Time and memory of training, beside the plain network's run with the same seed:", cost_table(values)]
    if values["runs_at_once"] > 1:
        parts.append(
            f"Up to {values['runs_at_once']} runs at once shared the machine. {experiment.circumstances}".strip()
        )
    elif experiment.circumstances:
        parts.append(experiment.circumstances)
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
