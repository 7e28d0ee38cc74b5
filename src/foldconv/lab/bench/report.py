"""Measurements as text."""

from __future__ import annotations

from typing import Any

from ...network.table import align

_TITLES = {
    "step": "training step",
    "eval": "evaluation-mode forward",
    "fold": "folding",
    "memory": "memory of a training step",
    "kept": "bytes kept for backward",
    "loop": "epoch of the plain network",
}


def table(report: dict[str, Any]) -> str:
    """What `measure` returned, as tables with a line on the machine before.

    Example:
        >>> result = {"what": "fold", "network": "net", "batch": 1, "size": 8, "medians": {"doconv": 0.5}}
        >>> machine = {"processor": "P", "threads": 2, "cores": 2, "gpu": None}
        >>> print(table({"machine": machine, "versions": {"torch": "2"}, "results": [result]}))
        P, 2 threads, torch 2
        <BLANKLINE>
        net  folding    time
        ───  ───────  ──────
             doconv   500 ms
    """
    machine = report["machine"]
    one_thread = report.get("arguments", {}).get("clock") == "cpu"
    counted = "CPU time of one thread" if one_thread else f"{machine['threads']} threads"
    where = machine["gpu"] or f"{machine['processor']}, {counted}"
    parts = [f"{where}, torch {report['versions']['torch']}"]
    return "\n\n".join([*parts, *map(_one, report["results"])])


def _one(result: dict[str, Any]) -> str:
    what = result["what"]
    case = result["network"] if what == "fold" else f"{result['network']} {result['batch']}×{result['size']}"
    rows: list[tuple[str, ...]]
    if what == "fold":
        rows = [(case, _TITLES[what], "time")]
        rows += [("", name, _milliseconds(seconds)) for name, seconds in result["medians"].items()]
        return align(rows)
    if what == "memory":
        rows = [(case, _TITLES[what], "held", "peak of a step", "ratio of the sum")]
        for name, found in result["bytes"].items():
            sizes = [f"{found[key] / 2**20:,.1f} MiB" for key in ("held", "peak")]
            rows.append(("", name, *sizes, f"{result['ratios'][name]['median']:.2f}"))
        return align(rows)
    if what == "kept":
        rows = [(case, _TITLES[what], "size", "ratio")]
        for name, size in result["bytes"].items():
            rows.append(("", name, f"{size / 2**20:,.1f} MiB", f"{result['ratios'][name]['median']:.2f}"))
        return align(rows)
    rows = [(case, _TITLES[what], "time", "ratio", "quartiles")]
    for name, seconds in result["medians"].items():
        ratio = result["ratios"][name]
        between = f"{ratio['lower']:.3f} to {ratio['upper']:.3f}"
        rows.append(("", name, _milliseconds(seconds), f"{ratio['median']:.3f}", between))
    text = align(rows)
    other = [name for name, same in result.get("folded_has_the_plain_modules", {}).items() if not same]
    if other:
        text += f"\nfolded to other modules than the plain network's: {', '.join(other)}"
    elif what == "eval":
        text += "\nfolded networks have the plain network's modules, in its order"
    return text


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{0 if seconds >= 0.1 else 2}f} ms"
