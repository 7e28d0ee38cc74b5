"""Write the tables of what training costs from benchmarks/results/cpu.json, which benchmarks/cpu.py measures.

python docs/write_speed_table.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
METHODS = ("doconv", "orepa", "repvgg", "acnet", "mobileone", "dbb")
SAID = {"step": "training step", "kept": "bytes kept for backward"}
BEGIN, END = "<!-- speed: written by docs/write_speed_table.py -->\n", "<!-- end of speed -->"


def table():
    """The table in Markdown: ratios to the plain network, steps first."""
    lines = ["| | " + " | ".join(f"`{m}`" for m in METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    rows = {}
    for what, said in SAID.items():
        for result in results:
            if result["what"] == what:
                case = f"{said}, {result['network'].rpartition('/')[2]} {result['batch']}×{result['size']}²"
                ratios = {contestant: found["median"] for contestant, found in result["ratios"].items()}
                rows[case] = rows.get(case, {}) | ratios
    for case, ratios in rows.items():
        cells = [f"{ratios[method]:.2f}" if method in ratios else "" for method in METHODS]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(text):
    """A page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    for path in (ROOT / "README.md", ROOT / "docs" / "speed.md"):
        text = path.read_text(encoding="utf-8")
        if BEGIN in text:
            path.write_text(with_table(text), encoding="utf-8")
