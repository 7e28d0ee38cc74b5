"""A comparison's report as text: Markdown with tables whose columns also line up unrendered."""

from __future__ import annotations

from typing import Any


def markdown(values: dict[str, Any]) -> str:
    """The report that `reporting.report` returns, for people."""
    import yaml

    parts = [f"# {values['title']}"]
    if values["runs_finished"] < values["runs_total"]:
        parts.append(f"**{values['runs_finished']} of {values['runs_total']} runs are finished**; the rest is missing.")
    parts += [
        "## Accuracy",
        accuracy_table(values),
        *_accuracy_remarks(values),
        "![](differences.png)",
        "![](curves.png)",
    ]
    parts += ["## Time and memory of training", cost_table(values), *_cost_remarks(values)]
    parts += ["## Size before and after folding", size_table(values), _size_remark(values)]
    parts += ["## Accuracy of each run", _seed_table(values), "Percent of the test images, folded network."]
    parts += ["## How this was made", f"```\n{values['command']}\n```", machines(values)]
    parts.append("```yaml\n" + yaml.safe_dump(values["config"], sort_keys=False, allow_unicode=True) + "```")
    return "\n\n".join(parts) + "\n"


def accuracy_table(values: dict[str, Any]) -> str:
    """Mean, spread and paired difference of each method."""
    among = " among all" if _comparisons(values) > 1 else ""
    rows: list[tuple[str, ...]] = [
        (
            "method",
            "seeds",
            "mean",
            "std",
            f"difference to {values['baseline']}",
            "95 % interval",
            f"resolved{among}",
            "seeds to resolve",
        ),
    ]
    for name, method in values["methods"].items():
        found = method["difference"]
        more = ("", "", "", "")
        if found is not None:
            resolved = "yes" if found["resolved_among_all"] else "alone only" if found["resolved"] else "no"
            needed = "" if found["seeds_to_resolve"] is None else f"{found['seeds_to_resolve']:,}"
            interval = f"{found['low']:+.2f} to {found['high']:+.2f}"
            more = (f"{found['mean']:+.2f}", interval, resolved, needed)
        rows.append((name, str(len(method["accuracies"])), _fixed(method["mean"]), _fixed(method["std"]), *more))
    return table(rows)


def cost_table(values: dict[str, Any]) -> str:
    """Training time and peak memory of each method."""
    base = values["baseline"]
    rows = [("method", "time", f"/ {base}", "range", "peak memory", f"/ {base}")]
    for name, method in values["methods"].items():
        time, memory = method["training_seconds"], method["peak_memory"]
        row = [name, "", "", "", "", ""]
        if time:
            row[1:4] = f"{time['median']:.1f} s", _fixed(time["ratio"]), _range(time)
        if memory:
            row[4:] = f"{memory['median'] / 2**20:,.0f} MiB", _fixed(memory["ratio"])
        rows.append(tuple(row))
    return table(rows)


def size_table(values: dict[str, Any]) -> str:
    """Parameters and multiply-adds while training and folded."""
    rows = [("method", "parameters", "folded", "multiply-adds of one image", "folded")]
    names = ("parameters_training", "parameters_folded", "macs_training", "macs_folded")
    rows += [
        (name, *("" if method[key] is None else f"{method[key]:,}" for key in names))
        for name, method in values["methods"].items()
    ]
    return table(rows)


def machines(values: dict[str, Any]) -> str:
    """What it was run on, a line each."""
    lines = [f"- device: {', '.join(values['devices'])}"] if values["devices"] else []
    for each in values["machines"]:
        machine = each["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in each["versions"].items())
        lines.append(f"- {machine['processor']}, {machine['cores']} cores, {machine['system']}; {versions}")
    return "\n".join(lines)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as a Markdown table, numbers flushed right.

    >>> print(table([("method", "mean"), ("plain", "97.5")]))
    | method | mean |
    |:-------|-----:|
    | plain  | 97.5 |
    """
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = "|:" + "-" * (widths[0] + 1) + "|" + "".join("-" * (width + 1) + ":|" for width in widths[1:])
    lines = [
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], rule, *lines[1:]])


def _accuracy_remarks(values: dict[str, Any]) -> list[str]:
    remarks = [
        "Percent of the test images, folded network after the last epoch; std over the seeds. Differences are in "
        f"percentage points, paired: the same seed gives {values['baseline']} and the other the same initial weights "
        "(where shapes allow) and the same order of images. The interval is Student's t. *Seeds to resolve*: with how "
        "many the interval would exclude zero if the true difference were the one observed; half of such experiments "
        "would still miss it, so plan with more."
    ]
    if (number := _comparisons(values)) > 1:
        remarks.append(
            f"{number} methods are compared with one baseline, so one in {round(20 / number)} such tables has a "
            "single interval that excludes zero by chance. *Resolved among all* takes that into account (Holm's rule: "
            "all its *yes* are right together with 95 %); *alone only* is resolved if no other method had been tried."
        )
    return remarks


def _cost_remarks(values: dict[str, Any]) -> list[str]:
    text = (
        f"Time of {values['time_is_of']}; medians over the seeds. A ratio is that to {values['baseline']}'s run with "
    )
    text += "the same seed, which ran next to it; the range is over the seeds."
    remarks = [text]
    if values["runs_at_once"] > 1:
        remarks.append(
            f"**Up to {values['runs_at_once']} runs were made at once and shared the machine**, so times say how the "
            "methods fare in such company, not what one takes alone."
        )
    if values["runs_continued"]:
        remarks.append(f"{values['runs_continued']} runs were cut off and continued; their times are left out.")
    if len(values["machines"]) > 1:
        remarks.append("**Runs were made on more than one machine**, so ratios of time may compare machines.")
    return remarks


def _size_remark(values: dict[str, Any]) -> str:
    methods, base = values["methods"], values["methods"][values["baseline"]]
    keys = ("parameters_folded", "macs_folded")
    other = [
        name for name, method in methods.items() if any(method[k] != base[k] for k in keys) and method["accuracies"]
    ]
    text = (
        f"Folded to another size than {values['baseline']}: {', '.join(other)}."
        if other
        else (f"Folded, all methods have the parameters and multiply-adds of {values['baseline']}.")
    )
    largest = max((method["largest_output_difference"] or 0.0 for method in methods.values()), default=0.0)
    return f"{text} The largest output difference between a trained network and its folded form is {largest:.1e}."


def _seed_table(values: dict[str, Any]) -> str:
    rows = [("seed", *values["methods"])]
    for seed in map(str, values["seeds"]):
        cells = (_fixed(method["accuracies"].get(seed)) for method in values["methods"].values())
        rows.append((seed, *cells))
    return table(rows)


def _comparisons(values: dict[str, Any]) -> int:
    return sum(method["difference"] is not None for method in values["methods"].values())


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _range(cost: dict[str, Any]) -> str:
    return "" if cost["ratio"] is None else f"{cost['lowest_ratio']:.2f} to {cost['highest_ratio']:.2f}"
