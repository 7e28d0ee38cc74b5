"""Write docs/methods (a page and a picture for each method, and the page that compares them) and `foldconv methods`.

    python docs/write_method_pages.py

From the registry, the head of each method's file, docs/methods.toml, docs/fold-errors.md,
benchmarks/results/cpu.json and the reports in docs/evidence.
"""

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

from torch import nn

import foldconv

DOCS = Path(__file__).parent
PAGES = DOCS / "methods"
sys.path.insert(0, str(DOCS))
import draw_methods  # noqa: E402
import evidence  # noqa: E402

FACTS = tomllib.loads((DOCS / "methods.toml").read_text(encoding="utf-8"))
PAGE = FACTS.pop("page")
SPEEDS = json.loads((DOCS.parent / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))["results"]
REPORTS = {
    name: json.loads((DOCS / "evidence" / name / "report.json").read_text(encoding="utf-8"))
    for name in evidence.EXPERIMENTS
    if (DOCS / "evidence" / name).is_dir()
}
SHORT = DOCS.parent / "src" / "foldconv" / "lab" / "methods.json"
WRITTEN = "<!-- written by docs/write_method_pages.py -->\n"


def equation(name):
    """The head of the method's file: what it computes, and where the paper says so."""
    return importlib.import_module(f"foldconv.methods.{name}").__doc__.strip().replace("``", "`")


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines) + "\n"


def published(facts):
    """The papers' figures."""
    if not facts["gains"]:
        return "The paper has no figure for the method alone that could stand here.\n"
    rows = []
    for gain in facts["gains"]:
        plain, rich = gain.get("plain", ""), gain["with"]
        digits = len(rich.partition(".")[2])
        gained = f"{float(rich) - float(plain):+.{digits}f}" if plain else ""
        rows.append([gain["task"], gain["network"], plain, rich, gained, gain["source"]])
    return table(["task", "network", "without", "with", "gain", "source"], rows)


def ours_rows(name):
    """What was measured here, a row for each comparison that holds the method."""
    rows = []
    for experiment, report in REPORTS.items():
        for label, found in report["methods"].items():
            if label.partition(":")[0] != name or not found["difference"]:
                continue
            d = found["difference"]
            interval = f"{d['low']:+.2f} to {d['high']:+.2f}"
            many = len(report["methods"]) > 2
            shown = "yes" if d["resolved_among_all" if many else "resolved"] else "no"
            network, epochs = report["title"].partition(" on ")[0], report["title"].rsplit(", ", 2)[1]
            images = ", ".join(filter(None, [evidence.EXPERIMENTS[experiment].images, label.partition(":")[2]]))
            rows.append([f"{images}: {network}, {epochs}", f"{d['mean']:+.2f}", interval, d["pairs"], shown])
    return rows


def ours(name):
    """The same as a table."""
    rows = ours_rows(name)
    if not rows:
        return "No comparison here holds it yet; `foldconv compare --methods plain," + name + "` makes one.\n"
    note = "\nPoints of accuracy of the folded network, paired by seed, 95 % interval ([Evidence](../evidence.md)).\n"
    return table(["comparison", "difference to plain", "interval", "seeds", "shown"], rows) + note


def short():
    """Advice, cost and evidence of each method, for the command line."""
    said = {}
    for name in foldconv.list_methods():
        steps = {network: round(found[name]["median"], 2) for network, found in of_steps().items() if name in found}
        evidence = [dict(zip(("data", "difference", "interval", "seeds", "shown"), row)) for row in ours_rows(name)]
        when = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(FACTS[name]["when"].split()))
        said[name] = {"when": when, "steps": steps, "evidence": evidence}
    return json.dumps(said, indent=1, ensure_ascii=False) + "\n"


def case(result):
    return f"{result['network'].rpartition('/')[2]}, {result['batch']}×{result['size']}²"


def of_steps():
    """What the steps of each network cost, all runs of it together."""
    found = {}
    for result in SPEEDS:
        if result["what"] == "step":
            found.setdefault(case(result), {}).update(result["ratios"])
    return found


def measured(name):
    """Training steps and kept bytes, as ratios to the plain network's."""
    found = {}
    for result in SPEEDS:
        if result["what"] in ("step", "kept") and name in result["ratios"]:
            found.setdefault(case(result), {})[result["what"]] = f"{result['ratios'][name]['median']:.2f}"
    if not found:
        return "The time of its training step has not been measured: `python benchmarks/cpu.py` measures it.\n"
    rows = [[network, ratios.get("step", ""), ratios.get("kept", "")] for network, ratios in found.items()]
    note = "\nOn one thread of a CPU; [Speed](../speed.md) has all methods side by side.\n"
    return table(["network, batch×size", "training step ÷ plain", "bytes kept for backward ÷ plain"], rows) + note


def convolution(name):
    """A convolution with its norm that the method applies to, and what it is in words."""
    size, groups = (7, 64) if name == "dilated" else (3, 1)
    conv = nn.Conv2d(64, 64, size, padding=size // 2, groups=groups, bias=False)
    words = "One 7×7 depthwise convolution of 64 channels" if groups > 1 else "One 3×3 convolution of 64 to 64 channels"
    return nn.Sequential(conv, nn.BatchNorm2d(64)), words


def counted(name):
    """Parameters and multiply-adds, which are counted, not measured."""
    net, words = convolution(name)
    cost = foldconv.summary(foldconv.expand(net, name), (1, 64, 32, 32))
    rows = [
        ["parameters", f"{cost.parameters_training:,}", f"{cost.parameters_folded:,}"],
        ["multiply-adds", f"{cost.macs_training:,}", f"{cost.macs_folded:,}"],
    ]
    note = f"\n{words} with its norm, one image of 32×32; a kernel is composed once for a batch of any size.\n"
    return table(["", "while training", "folded"], rows) + note


def on_gpus(facts):
    """The published cost of training."""
    if "published_cost" not in facts:
        return ""
    costs = facts["published_cost"]
    rows = [[c["network"], *(f"{c[k][0]} GB, {c[k][1]:.3f} s" for k in ("plain", "with"))] for c in costs]
    note = "\nOn four V100s, a batch of 256, as OREPA's paper reports it.\n"
    return "\n" + table(["network", "without", "with"], rows) + note


def fold_error(name):
    measured = (DOCS / "fold-errors.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}` \| (.*?) \| (.*?) \| (.*?) \|$", measured, re.MULTILINE)
    return (
        "{1} in float64 and {2} in float32, relative to the largest output, over {0} convolutions of every kind "
        "([Fold errors](../fold-errors.md)).\n".format(*row.groups())
    )


def page(name):
    """The Markdown of a method's page."""
    method, facts = foldconv.get_method(name), FACTS[name]
    return f"""{WRITTEN}
# {method.title}

`{name}`: {method.adds}. {method.paper}.

```python
rich = foldconv.expand(net, "{name}")
```

Its options are the arguments of [`foldconv.{method.__name__}`](../api.md#foldconv.{method.__name__}).

## When to take it

{facts["when"].strip()}

## Picture

![{method.title}: branches while training, and the taps of the folded kernel that each adds to]({name}.svg)

## Equation

{equation(name)}

## Fold error

{fold_error(name)}
## Cost of training

{measured(name)}
{counted(name)}{on_gpus(facts)}
Folded, it costs what the plain network costs{", or less: the groups that it learned" if name == "dgconv" else ""}.

## Gain, as published

{published(facts)}
## Gain, measured here

{ours(name)}"""


def at_a_glance():
    """The table that the methods are chosen by."""
    steps = of_steps()
    columns = ["resnet18, 8×224²", "cifar_resnet20, 32×32²"]
    rows = []
    for name in foldconv.list_methods():
        method = foldconv.get_method(name)
        ratios = [f"{steps[c][name]['median']:.2f}" if name in steps.get(c, {}) else "" for c in columns]
        rows.append([f"[{method.title}]({name}.md) `{name}`", f"{method.adds} ({method.kind})", method.gain, *ratios])
    return table(["method", "adds", "reported gain", *(f"step, {c}" for c in columns)], rows)


def index():
    return WRITTEN + PAGE["before"] + at_a_glance() + PAGE["after"]


def everything():
    """All that is written, by path."""
    pages = {PAGES / f"{name}.md": page(name) for name in foldconv.list_methods()}
    pictures = {PAGES / f"{name}.svg": draw_methods.picture(FACTS[name]) for name in foldconv.list_methods()}
    return {PAGES / "index.md": index(), SHORT: short(), **pages, **pictures}


if __name__ == "__main__":
    for path, text in everything().items():
        path.write_text(text, encoding="utf-8")
