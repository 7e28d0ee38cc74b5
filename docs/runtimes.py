"""Write docs/runtimes.md: what each runtime makes of each kind of convolution that `foldconv.export` writes for it.

    pip install ".[onnx,openvino,executorch,coreml,ncnn]" uv   # uv makes LiteRT's environment
    python docs/runtimes.py                                           # some minutes
    python docs/runtimes.py --only .onnx .xml                         # these formats; the others' columns stay

All kinds that a format takes are exported as one network of three inputs and an output for each kind, and compared as
every export is: the file, run by its runtime in a process of its own, with the network in float64. Where that fails,
the kinds are tried in halves until those are found that fail. What was found is kept in
benchmarks/results/runtimes.json.
"""

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import foldconv
from foldconv.deploy.apart import LITERT
from foldconv.deploy.formats import FORMATS
from foldconv.deploy.portable import kinds_of
from foldconv.errors import FoldConvError
from foldconv.layers.permuted import PermutedConv2d

PAGE = Path(__file__).with_name("runtimes.md")
RESULTS = PAGE.parents[1] / "benchmarks" / "results" / "runtimes.json"
SIZES = (9, 10, 11)
HEAD = """# Runtimes

What each runtime makes of each kind of convolution. *Right*: the file, run by its runtime in 32 bits at batches of 1
and 3 (or the one size that the format takes), computes what the network does in float64. *Rewritten*: so does the file,
in which other operations of exactly the same function stand for the convolution. *Written*: converted; the runtime does
not run on this system. *Refused*: `foldconv.export` ends before anything is converted, naming the layer.
Written by `python docs/runtimes.py`.

"""


def kinds():
    """Convolutions of 4 channels by what is special about them."""
    found = {}
    shapes = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))
    for rank, (plain, turned) in enumerate(shapes, 1):
        found |= {
            f"{rank}-d": plain(4, 6, 3, padding=1),
            f"{rank}-d, strided": plain(4, 6, 3, stride=2, padding=1),
            f"{rank}-d, grouped": plain(4, 8, 3, groups=2),
            f"{rank}-d, depthwise": plain(4, 4, 3, padding=1, groups=4),
            f"{rank}-d, dilated": plain(4, 6, 3, dilation=2),
            f"{rank}-d, transposed": turned(4, 6, 3, stride=2, padding=1),
        }
    found |= {
        "even": nn.Conv2d(4, 6, 4, padding=1),
        'even, "same"': nn.Conv2d(4, 6, 4, padding="same"),
        'dilated, "same"': nn.Conv2d(4, 6, (3, 4), padding="same", dilation=2),
        "asymmetric": nn.Conv2d(4, 6, (1, 5), padding=(0, 2), stride=(2, 1)),
        "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        "replicate": nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
        "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        "circular, 1-d": nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        'circular, even, "same"': nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
        "transposed, grouped": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
        "transposed, output_padding": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        "transposed, dilated": nn.ConvTranspose2d(4, 6, 3, dilation=2),
        "permuted": PermutedConv2d(4, 4, 3, padding=1, groups=2, input_order=[2, 0, 3, 1], output_order=[1, 3, 0, 2]),
    }
    return found


class Beside(nn.Module):
    """Convolutions beside each other: each reads the input of its rank and has an output of its own."""

    def __init__(self, convs):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(conv, nn.ReLU()) for conv in convs)
        self.ranks = [len(conv.kernel_size) for conv in convs]
        self.inputs = [torch.randn(2, 4, *SIZES[:rank]) for rank in sorted(set(self.ranks))]

    def forward(self, *inputs):
        by_rank = {x.dim() - 2: x for x in inputs}
        return [part(by_rank[rank]) for part, rank in zip(self.parts, self.ranks)]


def refusal(conv, form):
    """Why a format does not take a convolution; empty: it does."""
    return "; ".join(form.refused[kind] for kind in kinds_of(conv, form) if kind in form.refused)


def outcomes(convs, form):
    """By name, what became of the convolutions in a format; and the largest error of those that were run."""
    taken = {name: conv for name, conv in convs.items() if not refusal(conv, form)}
    found = {name: f"refused: {refusal(conv, form)}" for name, conv in convs.items() if name not in taken}
    if not taken:
        return found, 0.0
    network = Beside(list(taken.values()))
    with tempfile.TemporaryDirectory() as folder:
        try:
            exported = foldconv.export(network, Path(folder, f"net{form.suffix}"), tuple(network.inputs))
        except FoldConvError as error:
            if len(taken) == 1:
                return found | {name: f"{type(error).__name__}: {error}" for name in taken}, 0.0
            half = len(taken) // 2
            parts = [dict(list(taken.items())[start:end]) for start, end in ((0, half), (half, None))]
            (first, one), (second, other) = (outcomes(part, form) for part in parts)
            found |= first | second
            return {name: found[name] for name in convs}, max(one, other)
    ran = "right" if exported.error is not None else "written"
    for name, conv in taken.items():
        rewritten = any(kind in form.rewritten for kind in kinds_of(conv, form))
        found[name] = ("rewritten" if ran == "right" else "rewritten, written") if rewritten else ran
    return {name: found[name] for name in convs}, exported.error or 0.0


def page(found):
    """The page, from what was found by suffix."""
    lines = [f"| kind | {' | '.join(FORMATS[suffix].name for suffix in found)} |", "|---" * (len(found) + 1) + "|"]
    why = []
    for name in kinds():
        cells = [name]
        for suffix, column in found.items():
            outcome, _, reason = column["outcomes"][name].partition(": ")
            if reason:
                said = f"{FORMATS[suffix].name} {reason}" if outcome == "refused" else f"{name}: {reason}"
                why += [said] if said not in why else []
                outcome += f" [{why.index(said) + 1}]"
            cells.append(outcome)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"[{i}] {said}  " for i, said in enumerate(why, 1)), ""]
    lines += ["| format | file | batch | largest error | allowed | versions |", "|---|---|---|---|---|---|"]
    for suffix, column in found.items():
        form = FORMATS[suffix]
        batch = ("any" if form.largest_batch is None else f"up to {form.largest_batch}") if form.any_batch else "fixed"
        shown = f"{column['error']:.0e}" if column["error"] else "not run"
        lines.append(f"| {form.name} | {suffix} | {batch} | {shown} | {form.tolerance:.0e} | {column['with']} |")
    return HEAD + "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FORMATS, metavar="SUFFIX", help="these; the others' columns stay")
    only = parser.parse_args().only
    torch.manual_seed(0)
    convs = kinds()
    for suffix in only or FORMATS:
        form = FORMATS[suffix]
        found, error = outcomes(convs, form)
        packages = LITERT if form.apart else [f"{package} {version(package)}" for package in ("torch", *form.packages)]
        system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
        column = {"outcomes": found, "error": error, "with": ", ".join([*packages, system])}
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        kept = {key: column if key == suffix else kept[key] for key in FORMATS if key == suffix or key in kept}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(kept), encoding="utf-8")
        right = sum(outcome in ("right", "rewritten") for outcome in found.values())
        print(f"{suffix}: {right} of {len(convs)} right, within {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
