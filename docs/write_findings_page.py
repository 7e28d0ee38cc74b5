"""Write docs/findings.md from the heads of findings/*.sh: ``python docs/write_findings_page.py``."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "findings.md"
WRITTEN = "<!-- written by docs/write_findings_page.py -->\n"


def head(path):
    """What happens, and what was guessed."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    comments = []
    for line in lines:
        if not line.startswith("#"):
            break
        comments.append(line.removeprefix("#").strip())
    happens, _, guessed = " ".join(comments).partition("Guessed before running:")
    return happens.strip(), guessed.strip()


def page():
    lead = (ROOT / "findings" / "README.md").read_text(encoding="utf-8").strip()
    parts = [WRITTEN, lead, ""]
    for path in sorted((ROOT / "findings").glob("*.sh")):
        happens, guessed = head(path)
        title = path.stem.replace("_", " ").capitalize()
        parts += [f"## {title}", "", happens, "", f"*Guessed before running:* {guessed}", ""]
        parts += [f"    bash findings/{path.name}", ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
