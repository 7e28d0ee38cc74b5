"""The pictures of the methods' pages as SVG: each branch, the taps of the kernel that it adds to, and the fold."""

from html import escape

INK, PAPER, BOX, NORM, TAP = "#263238", "#fafafa", "#e8eaf6", "#fff3e0", "#5c6bc0"
ROW, LEFT, GRID = 56, 70, 40  # heights of a branch; where boxes begin; the side of a drawn kernel


def taps(pattern, size):
    """The taps (row, column) of a kernel of so many a side that a branch adds to."""
    places = [(i, j) for i in range(size) for j in range(size)]
    middle = size // 2
    if pattern == "all":
        return places
    if pattern == "blocks":  # four groups of channels
        return [(i, j) for i, j in places if i // (size // 4) == j // (size // 4)]
    if "@" in pattern:
        count, apart = map(int, pattern.split("@"))
        near = [middle + apart * (n - count // 2) for n in range(count)]
        return [(i, j) for i, j in places if i in near and j in near]
    return [(i, j) for i, j in places if (pattern == "column" or i == middle) and (pattern == "row" or j == middle)]


def text(x, y, said, size=12, anchor="middle", weight="normal"):
    look = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {look}>{escape(said)}</text>'


def line(x, y, to_x, to_y, arrow=False):
    end = ' marker-end="url(#tip)"' if arrow else ""
    return f'<path d="M{x} {y}L{to_x} {to_y}" stroke="{INK}" fill="none"{end}/>'


def box(x, y, said):
    """A box around some text, centred on height y, and its width."""
    width = 18 + round(7.2 * len(said))
    color = NORM if said == "BN" else BOX
    drawn = f'<rect x="{x}" y="{y - 14}" width="{width}" height="28" rx="4" fill="{color}" stroke="{INK}"/>'
    return drawn + text(x + width / 2, y + 4, said), width


def kernel(x, y, pattern, size):
    """A kernel centred on height y, with the taps of a pattern filled."""
    side, top, filled = GRID / size, y - GRID / 2, taps(pattern, size)
    cells = []
    for i in range(size):
        for j in range(size):
            color = TAP if (i, j) in filled else "white"
            where = f'x="{x + j * side:g}" y="{top + i * side:g}" width="{side:g}" height="{side:g}"'
            cells.append(f'<rect {where} fill="{color}" stroke="{INK}" stroke-width=".5"/>')
    return "".join(cells)


def picture(facts):
    """The SVG of one method: on the left what trains, on the right what each branch adds to the fold."""
    branches, size = facts["branches"], facts.get("grid", 3)
    drawn, middle = [], 44 + ROW * len(branches) / 2
    widths = []
    for number, branch in enumerate(branches):
        x, y = LEFT, 44 + ROW * (number + 0.5)
        drawn.append(line(34, y, x, y, arrow=True))
        for said in [*branch["boxes"], *(["scale"] if facts.get("scaled") else [])]:
            one, width = box(x, y, said)
            drawn += [one, line(x + width, y, x + width + 16, y)]
            x += width + 16
        widths.append(x)
    plus = max(widths) + 12
    for number, x in enumerate(widths):
        y = 44 + ROW * (number + 0.5)
        drawn.append(line(x, y, plus, y))
    last = 44 + ROW * (len(branches) - 0.5)
    drawn += [line(34, 44 + ROW / 2, 34, last), line(plus, 44 + ROW / 2, plus, last), line(16, middle, 34, middle)]
    drawn.append(text(10, middle - 6, "x", 14))
    x = plus
    if len(branches) > 1:
        circle = f'<circle cx="{plus + 20}" cy="{middle}" r="10" fill="white" stroke="{INK}"/>'
        drawn += [line(plus, middle, plus + 10, middle), circle, text(plus + 20, middle + 5, "+", 16)]
        x = plus + 30
    if facts.get("after"):
        one, width = box(x + 12, middle, facts["after"])
        drawn += [line(x, middle, x + 12, middle), one]
        x += 12 + width
    drawn += [line(x, middle, x + 26, middle, arrow=True), text(x + 38, middle + 4, "y", 14)]
    right = x + 90
    drawn.append(f'<path d="M{right - 30} 16V{44 + ROW * len(branches)}" stroke="{INK}" stroke-dasharray="3 4"/>')
    for number, branch in enumerate(branches):
        y = 44 + ROW * (number + 0.5)
        drawn.append(kernel(right, y, branch["taps"], size))
        if number + 1 < len(branches):
            drawn.append(text(right + GRID / 2, y + ROW / 2 + 5, "+", 14))
    drawn += [line(right + GRID + 8, middle, right + GRID + 40, middle, arrow=True)]
    pattern = "blocks" if branches[0]["taps"] == "blocks" else "all"
    drawn.append(kernel(right + GRID + 54, middle, pattern, size))
    drawn.append(text(right + GRID + 74, middle + 36, facts.get("folded", "k×k")))
    drawn += [text(x, 24, said, 12, "start", "bold") for x, said in ((LEFT, "while training"), (right, "its fold"))]
    width, height = right + 2 * GRID + 90, 60 + ROW * len(branches)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" '
    head += f'width="{width:g}" height="{height}"'
    tip = '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
    tip += '<path d="M0 0L7 3L0 6Z"/></marker></defs>'
    ground = f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>'
    style = f' font-family="sans-serif" fill="{INK}">'
    return head + style + tip + ground + "\n" + "\n".join(drawn) + "\n</svg>\n"
