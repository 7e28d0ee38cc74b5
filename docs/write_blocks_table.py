"""Write the table of other people's blocks into docs/blocks.md: ``python docs/write_blocks_table.py``."""

from pathlib import Path

from foldconv.blocks import families

PAGE = Path(__file__).parent / "blocks.md"
START, END = "<!-- blocks: written by docs/write_blocks_table.py -->\n", "<!-- end of blocks -->"
SOURCES = {"timm": "timm", "ultralytics": "ultralytics", "copied": "by attributes"}


def table():
    rows = ["| source | class, or attributes | what it is |", "|---|---|---|"]
    for source, title in SOURCES.items():
        for own, names, text in families():
            if own == source:
                spans = ", ".join(f"`{name}`" for name in names.split(", "))
                rows.append(f"| {title} | {spans} | {text.replace('``', '`')} |")
    return "\n".join(rows) + "\n"


def with_table(text):
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
