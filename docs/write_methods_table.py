"""Write the README's table of methods from what `foldconv methods` says: ``python docs/write_methods_table.py``."""

import json
from pathlib import Path

import foldconv

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SAID = ROOT / "src" / "foldconv" / "lab" / "methods.json"
START, END = "<!-- methods: written by docs/write_methods_table.py -->\n", "<!-- end of methods -->"
FOR = {
    "most networks, pretrained or not; the first to try": "doconv",
    "a small network of square kernels with norms, from scratch": "acnet",
    "a residual network with norms, trained long from scratch": "orepa",
    "a plain stack of 3×3 convolutions": "repvgg",
    "the same, to run in int8": "qarepvgg",
    "depthwise and pointwise convolutions": "mobileone",
    "large depthwise kernels": "dilated",
    "a compact network without norms": "expandnet",
    "a cheaper network: it learns groups": "dgconv",
    "where training time is free": "dbb",
}
"""A task, and the method whose paper is about it; `orepa_vgg` is a further step of another."""
CASES = {
    "cifar_resnet20, 32×32²": "ResNet-20",
    "resnet18, 8×224²": "ResNet-18",
    "mobilenetv3_small_100, 8×224²": "MobileNetV3",
}


def table():
    said = json.loads(SAID.read_text(encoding="utf-8"))
    rows = ["| for | take | step | shown here | as published |", "|---|---|---|---|---|"]
    for task, name in FOR.items():
        steps = said[name]["steps"]
        step = ", ".join(f"{steps[case]:.2f} {network}" for case, network in CASES.items() if case in steps)
        found = _shown(said[name]["evidence"])
        gain = foldconv.get_method(name).gain
        rows.append(f"| {task} | [`{name}`](docs/methods/{name}.md) | {step} | {found} | {gain} |")
    return "\n".join(rows) + "\n"


def _shown(evidence):
    """Gains and losses that are more than chance, and where nothing was shown, by what was trained on."""
    names = [each["data"].partition(":")[0] for each in evidence]
    networks = [each["data"].partition(": ")[2].partition(",")[0] for each in evidence]
    labels = [f"{name} ({net})" if names.count(name) > 1 else name for name, net in zip(names, networks)]
    shown = [f"{each['difference']} on {label}" for each, label in zip(evidence, labels) if each["shown"] == "yes"]
    others = [label for each, label in zip(evidence, labels) if each["shown"] != "yes"]
    where = ", ".join(others) if len(others) < 3 else f"{len(others)} {'others' if shown else 'data sets'}"
    return "; ".join(shown + [f"nothing on {where}"] * bool(others))


def with_table(text):
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
