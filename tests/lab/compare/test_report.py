"""Numbers of the report against numbers worked out by hand, and what it says about them."""

import csv
import json
import re
import shlex

import pytest

from foldconv.errors import UnsupportedError
from foldconv.lab.cli import parse
from foldconv.lab.compare.config import CompareConfig, Job
from foldconv.lab.compare.markdown import markdown
from foldconv.lab.compare.pictures import plot_curves
from foldconv.lab.compare.reporting import command, holm, report, summarize
from foldconv.lab.compare.results import Outcome, curve
from foldconv.lab.train import TrainConfig


def outcome(method, seed, accuracy, seconds=1.0, starts=1, **result):
    sizes = {"parameters_training": 9, "parameters_folded": 5, "macs_training": 8, "macs_folded": 4}
    values = {"accuracy_folded": accuracy / 100, "training_seconds": seconds, **sizes, **result}
    return Outcome(Job(method, seed, None), values, starts, 1, seconds + 1)


def summary(*found, methods="plain,doconv", seeds=4):
    values = summarize(CompareConfig(tuple(methods.split(",")), seeds), list(found))
    return {**values, "machines": [], "command": ""}


FOUR = [outcome("plain", seed, value) for seed, value in enumerate((85, 81, 87, 83))]
BETTER = [outcome("doconv", seed, value) for seed, value in enumerate((86, 83, 90, 87))]

CANCEL = ("plain", (92.96, 93.22)), ("doconv", (95.93, 90.25))


def test_paired_difference_is_that_of_the_tables():
    """Differences 1, 2, 3, 4: mean 2.5, std 1.291, t = 3.182, so 2.5 ± 2.054; unpaired it would be no difference."""
    doconv = summary(*FOUR, *BETTER)["methods"]["doconv"]
    found = doconv["difference"]
    received = [doconv["mean"], doconv["std"], found["mean"], found["low"], found["high"], found["std"]]
    assert received == pytest.approx([86.5, 2.887, 2.5, 0.446, 4.554, 1.291], abs=5e-4)
    assert (found["resolved"], found["resolved_among_all"]) == (True, True)
    assert found["seeds_to_resolve"] == 4


def test_differences_that_cancel_but_for_rounding_ask_for_no_seeds():
    plain, doconv = ([outcome(name, seed, each) for seed, each in enumerate(values)] for name, values in CANCEL)
    found = summary(*plain, *doconv, seeds=2)["methods"]["doconv"]["difference"]
    assert 0 < abs(found["mean"]) < 1e-9
    assert found["seeds_to_resolve"] is None


def test_seeds_that_one_lacks_are_left_out_of_the_pairs_only():
    methods = summary(*FOUR[1:], *BETTER[:3])["methods"]
    assert methods["doconv"]["difference"]["pairs"] == 2
    assert methods["doconv"]["difference"]["mean"] == pytest.approx(2.5)
    assert methods["plain"]["mean"] == pytest.approx((81 + 87 + 83) / 3)
    assert methods["doconv"]["mean"] == pytest.approx((86 + 83 + 90) / 3)


def test_ratios_are_per_seed_and_runs_that_were_cut_off_have_no_time():
    plain = [outcome("plain", seed, 80, time) for seed, time in enumerate((1.0, 10.0, 2.0, 4.0))]
    doconv = [outcome("doconv", seed, 81, time) for seed, time in enumerate((1.5, 11.0, 2.4))]
    cut_off = outcome("doconv", 3, 81, 400.0, starts=2)
    values = summary(*plain, *doconv, cut_off)
    time = values["methods"]["doconv"]["training_seconds"]
    expected = {"median": 2.4, "ratio": 1.2, "lowest_ratio": 1.1, "highest_ratio": 1.5, "runs": 3}
    assert time == pytest.approx(expected)  # of medians the ratio would be 2.4 / 3
    assert "1 runs were cut off and continued; their times are left out" in markdown(values)
    # No seed in common: no ratio.
    time = summary(*plain[:2], *doconv[2:])["methods"]["doconv"]["training_seconds"]
    assert (time["median"], time["ratio"]) == (2.4, None)


def test_without_training_seconds_the_time_is_the_whole_runs():
    runs = [outcome(m, s, 80, v) for m, v in (("plain", 4.0), ("doconv", 5.0)) for s in (0, 1)]
    for each in runs:
        each.result["seconds"] = each.result.pop("training_seconds")
    values = summary(*runs, seeds=2)
    assert values["time_is_of"] == "whole runs"
    assert values["methods"]["doconv"]["training_seconds"]["ratio"] == 1.25
    assert "Time of whole runs" in markdown(values)


def test_holm_is_stricter_than_each_alone():
    base = [80.0] * 5
    clear, near, nothing = [81, 81.1, 80.9, 81, 81], [80.3, 80.6, 80.3, 81.2, 80.4], [79, 81, 80, 80.5, 79.5]
    assert holm({"near": (base, near)}) == {"near"}  # t = 3.31 against 2.78
    three = {"near": (base, near), "clear": (base, clear), "nothing": (base, nothing)}
    assert holm(three) == {"clear"}  # 'near' would need 3.50 among the two that are left
    assert holm({}) == set()


def test_the_report_tells_alone_from_among_all():
    base = [outcome("plain", seed, 80) for seed in range(5)]
    near = [outcome("near", seed, value) for seed, value in enumerate((80.3, 80.6, 80.3, 81.2, 80.4))]
    nothing = [outcome("nothing", seed, value) for seed, value in enumerate((79, 81, 80, 80.5, 79.5))]
    text = markdown(summary(*base, *near, *nothing, methods="plain,near,nothing", seeds=5))
    row = next(line for line in text.splitlines() if line.startswith("| near"))
    assert [cell.strip() for cell in row.split("|")][4:8] == ["0.38", "+0.56", "+0.09 to +1.03", "alone only"]
    assert "2 methods are compared with one baseline, so one in 10 such tables" in text
    text = markdown(summary(*base, *near, methods="plain,near", seeds=5))
    assert "among all" not in text


def test_no_difference_needs_no_number_of_seeds():
    same = [outcome("doconv", each.job.seed, each.accuracy) for each in FOUR]
    found = summary(*FOUR, *same)["methods"]["doconv"]["difference"]
    assert (found["mean"], found["seeds_to_resolve"], found["resolved"]) == (0, None, False)


@pytest.mark.parametrize(
    ("folded", "message"), [(5, "all methods have the parameters"), (6, "another size than plain: doconv.")]
)
def test_another_size_after_folding_is_said(folded, message):
    runs = [outcome("plain", 0, 80), outcome("doconv", 0, 81, parameters_folded=folded, parameters_training=12)]
    text = markdown(summary(*runs, seeds=1))
    assert message in text
    assert re.search(rf"\| doconv \| +12 \| +{folded} \|", text)


def test_a_single_seed_has_neither_spread_nor_interval():
    values = summary(outcome("plain", 0, 80), outcome("doconv", 0, 81), seeds=1)
    assert values["methods"]["doconv"]["difference"] is None
    assert values["methods"]["doconv"]["std"] is None
    markdown(values)


def test_files_of_the_report(fake, run, config, tmp_path):
    fake()
    run(config(seeds=3))
    folder = tmp_path / "out"
    before = {name: (folder / name).read_bytes() for name in ("report.md", "report.json", "results.csv")}
    for name in before:
        (folder / name).unlink()
    values = report(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert json.loads(before["report.json"]) == values
    rows = list(csv.DictReader(before["results.csv"].decode().splitlines()))
    assert len(rows) == 6
    assert [(row["method"], row["seed"], float(row["accuracy_folded"])) for row in rows[:3]] == [
        ("plain", "0", 0.9),
        ("doconv", "0", 0.91),
        ("plain", "1", 0.91),
    ]
    assert rows[1]["training_seconds"] == "3.0"
    assert float(rows[1]["wall_seconds"]) > 0
    for name in ("curves.png", "differences.png"):
        picture = (folder / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 100_000
    text = before["report.md"].decode()
    assert str(tmp_path) not in text  # where it lies is nobody else's business
    assert values["machines"][0]["versions"]["foldconv"] in text


def test_nothing_to_report(tmp_path, config):
    config().save(tmp_path)
    with pytest.raises(UnsupportedError, match="none of 6 runs has ended well"):
        report(tmp_path)
    with pytest.raises(UnsupportedError, match="not the folder of a comparison"):
        report(tmp_path / "elsewhere")


def test_curves_of_runs_in_progress_or_damaged(tmp_path):
    job = Job("plain", 0, tmp_path)
    assert curve(job) == []
    job.folder.mkdir(parents=True)
    (job.folder / "metrics.csv").write_text("epoch,test_accuracy\n1,0.5\n2,0.75\n")
    assert curve(job) == [(1, 50.0), (2, 75.0)]
    (job.folder / "metrics.csv").write_text("epoch\n1\n")
    assert curve(job) == []
    plot_curves({"plain": [[], [(1, 50.0)]], "doconv": []}, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").exists()


def test_the_command_repeats_the_comparison():
    train = TrainConfig(
        epochs=7,
        lr=0.05,
        seed=3,
        schedule="cosine",
        architecture_args={"width": 4, "depth": 14},
        download=False,
        channels_last=True,
        data_folder="/home/someone/sets",
        include=["stem*", "blocks.*"],
    )
    config = CompareConfig(("plain", "orepa:large=plain"), 5, train)
    text = command(config, "/home/someone/out")
    assert "/home" not in text
    options = parse(shlex.split(text)[1:])
    assert (options.methods, options.seeds, options.seed, options.out) == ("plain,orepa:large=plain", 5, 3, "out")
    assert (options.epochs, options.lr, options.schedule, options.data_folder) == (7, 0.05, "cosine", "sets")
    assert (options.download, options.channels_last, options.include) == (False, True, ["stem*", "blocks.*"])
    assert options.architecture_args == [("width", 4), ("depth", 14)]
