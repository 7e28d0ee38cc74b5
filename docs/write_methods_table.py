"""Write the table of methods into README.md from the registry: ``python docs/write_methods_table.py``."""

from pathlib import Path

import foldconv

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- methods: written by docs/write_methods_table.py -->\n", "<!-- end of methods -->"


def table():
    rows = ["| name | method | adds | kind | reported gain | paper |", "|---|---|---|---|---|---|"]
    for name in foldconv.list_methods():
        m = foldconv.get_method(name)
        rows.append(f"| `{name}` | {m.title} | {m.adds} | {m.kind} | {m.gain} | {m.paper} |")
    return "\n".join(rows) + "\n"


def with_table(text):
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
