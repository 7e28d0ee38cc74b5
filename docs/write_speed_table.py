"""Write the README's table of training steps from the measurements in benchmarks/results.

python docs/write_speed_table.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("cpu-resnet18.json", "cpu-resnet50.json")
METHODS = ("doconv", "orepa", "repvgg", "acnet", "mobileone", "dbb")
BEGIN, END = "<!-- speed: written by docs/write_speed_table.py -->\n", "<!-- end of speed -->"


def cell(ratios, method):
    """The ratio, beside it the authors' own layer's."""
    if method not in ratios:
        return ""
    original = ratios.get(f"{method} (original)")
    return f"{ratios[method]:.2f}" + ("" if original is None else f" ({original:.2f})")


def table():
    """The table in Markdown."""
    lines = ["| training step | " + " | ".join(f"`{m}`" for m in METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for name in FILES:
        report = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
        network = report["arguments"]["network"].partition("/")[2]
        for result in report["results"]:
            if result["what"] == "step":
                ratios = {contestant: found["median"] for contestant, found in result["ratios"].items()}
                case = f"{network}, {result['batch']}×{result['size']}²"
                lines.append(f"| {case} | " + " | ".join(cell(ratios, m) for m in METHODS) + " |")
    return "\n".join(lines) + "\n"


def with_table(text):
    """The README with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
