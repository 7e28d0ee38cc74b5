"""Our docstrings as Markdown, for the page of the API: an extension of griffe, which mkdocs.yml names."""

import inspect
import re

import griffe

HEAD = re.compile(r"(Args|Attributes|Example|Raises|Returns|Shapes|Source|Yields):(?: +(.*))?")
ENTRY = re.compile(r"([\w*]+(?:, [\w*]+)*): +(.*)")
LISTS = ("Args", "Attributes", "Raises")


def markdown(text):
    """A docstring with its parts as lists, paragraphs and code."""
    said, part, lines = [], None, []
    for line in [*inspect.cleandoc(text).splitlines(), "Args:"]:  # the last closes what is open
        if found := HEAD.fullmatch(line):
            said += paragraphs(part, lines)
            part, lines = found[1], [found[2]] if found[2] else []
        elif line.startswith(">>>") and part != "Example":  # an example without a title
            said += paragraphs(part, lines)
            part, lines = "Example", [line]
        else:
            lines.append(line)
    return "\n".join(said).strip()


def paragraphs(part, lines):
    """One part of a docstring; None is what stands before all of them."""
    if part is None:
        return ["\n".join(lines).strip(), ""]
    text = inspect.cleandoc("\n".join(["", *lines])).strip()
    if part == "Example":
        return [f"**{part}**", "", "```pycon", text, "```", ""]
    if part not in LISTS:
        return [f"**{part}:** {text}", ""] if text else []
    items = []
    for line in text.splitlines():
        entry = ENTRY.fullmatch(line)
        if entry:
            items.append(f"- `{entry[1]}`: {entry[2]}")
        else:  # what goes on, or a remark on all of them
            items.append(f"    {line.strip()}" if line.startswith(" ") else f"\n{line}")
    return [f"**{part}**", "", *items, ""] if items else []


class Docstrings(griffe.Extension):
    """Rewrites every docstring when the package is read."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_class(self, *, cls, **kwargs):
        """A class of one rank has its arguments from `_...Nd`, here as when it is imported."""
        for base in cls.bases:
            shared = cls.parent.members.get(str(base))
            if cls.docstring and re.fullmatch(r"_\w+Nd", str(base)) and shared and shared.docstring:
                arguments = shared.docstring.value.partition("**Args**")[2]
                cls.docstring.value += "\n\n**Args**" + arguments if arguments else ""
