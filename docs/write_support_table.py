"""Write the README's table of what it works with, from the pages that tests and commands wrote:

python docs/write_support_table.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
START, END = "<!-- support: written by docs/write_support_table.py -->\n", "<!-- end of support -->"
FRAMEWORKS = (
    "PyTorch: all methods; Keras 3 on TensorFlow, JAX and torch: `doconv`, `orepa`, `repvgg`; MXNet Gluon, in an "
    "environment of its own: `doconv` ([Keras and Gluon](docs/keras-and-gluon.md))"
)


def rows_of(page):
    """The first table of a page: its head, and its rows."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text.partition("\n|")[2].partition("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return head, rows


def networks():
    _, rows = rows_of("networks.md")
    families = sorted({row[0].partition("/")[0] for row in rows}, key=str.lower)
    worst = max(float(cell) for row in rows for cell in row[-2:] if re.fullmatch(r"[\d.e+-]+", cell))
    return (
        f"{len(rows)} of {', '.join(families)}: expanded, trained, folded; largest error {worst:.0e} in float64 "
        "([each](docs/networks.md))"
    )


def trainers():
    head, rows = rows_of("hosts.md")
    names = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", row[0]) for row in rows]
    done = f"{', '.join(head[1:-1])} and {head[-1]}"
    return f"{'; '.join(names)}: what of {done} works, with its test ([each](docs/hosts.md))"


def runtimes():
    head, rows = rows_of("runtimes.md")
    found = []
    for column, name in enumerate(head[1:], 1):
        cells = [row[column] for row in rows]
        kinds = [re.sub(r" \[\d+\]", "", cell) for cell in cells]
        right, refused = sum(kind in ("right", "rewritten") for kind in kinds), kinds.count("refused")
        written = len(kinds) - right - refused
        parts = [f"{right} of {len(cells)} right"] if right else []
        parts += [f"{written} written, not run here"] if written else []
        parts += [f"{refused} refused"] if refused else []
        found.append(f"{name} ({', '.join(parts)})")
    return f"kinds of convolution: {', '.join(found)} ([each](docs/runtimes.md))"


def table():
    facts = {"frameworks": FRAMEWORKS, "networks": networks(), "trainers": trainers(), "runtimes": runtimes()}
    return "| | |\n|---|---|\n" + "".join(f"| {what} | {fact} |\n" for what, fact in facts.items())


def with_table(text):
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
