"""docs/evidence.md is what docs/evidence.py writes from the committed results; its experiments can be run."""

import csv
import importlib.util
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from foldconv.lab import recipes
from foldconv.lab.compare.config import method_and_options
from foldconv.lab.train import TrainConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "docs" / "evidence.py")
    sys.modules["evidence"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["evidence"]


def test_the_page_is_written_from_the_results(evidence):
    assert evidence.PAGE.read_text(encoding="utf-8") == evidence.page()
    assert (evidence.KEPT / "mnist" / "report.json").is_file()


def test_results_are_of_these_experiments(evidence):
    for folder in evidence.KEPT.iterdir():
        experiment = evidence.EXPERIMENTS[folder.name]
        with open(folder / "results.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["method"] for row in rows] == list(experiment.methods) * experiment.seeds
        config = TrainConfig.load(recipes.find(experiment.config))
        assert {(row["architecture"], int(row["epochs"])) for row in rows} == {(config.architecture, config.epochs)}


def test_readme_tells_what_was_measured(evidence):
    with open(evidence.KEPT / "mnist" / "results.csv", encoding="utf-8") as file:
        rows = [(row["method"], 100 * float(row["accuracy_folded"])) for row in csv.DictReader(file)]
    plain, doconv = ([value for name, value in rows if name == method] for method in ("plain", "doconv"))
    gain = statistics.fmean(doconv) - statistics.fmean(plain)
    assert f"DO-Conv gains {gain:.2f} points over {len(plain)} seeds" in (ROOT / "README.md").read_text("utf-8")


def test_every_experiment_has_its_recipe_and_methods(evidence):
    for experiment in evidence.EXPERIMENTS.values():
        assert recipes.find(experiment.config).is_file()
        names = [method_and_options(method)[0] for method in experiment.methods]  # raises for an unknown one
        assert names[0] == "plain"


def test_a_verdict_says_no_more_than_the_intervals(evidence):
    def method(mean, resolved):
        return {"difference": {"mean": mean, "resolved_among_all": resolved}}

    methods = {"plain": {"difference": None}, "a": method(1.0, True), "b": method(-1.0, True), "c": method(2.0, False)}
    assert evidence.verdict({"methods": methods, "baseline": "plain", "seeds": [0, 1]}) == (
        "More accurate than plain with 2 seeds: a. Less accurate than plain with 2 seeds: b. "
        "Neither shown with 2 seeds: c."
    )


def test_the_overview_marks_what_is_resolved_among_all(evidence):
    def of(mean, resolved):
        return {"difference": {"mean": mean, "resolved_among_all": resolved}}

    methods = {"plain": {"difference": None}, "doconv": of(1.0, True), "orepa": of(-2.5, False)}
    lines = evidence.overview({"mnist": {"methods": methods, "seeds": [0, 1]}}).splitlines()
    assert lines[2:] == [
        "|  | MNIST |",
        "| --- | --- |",
        "| seeds | 2 |",
        "| `doconv` | **+1.00** |",
        "| `orepa` | -2.50 |",
    ]


def test_a_part_of_data_in_the_order_of_its_classes_has_them_all(evidence, tmp_path):
    labels = np.repeat(np.arange(10), 5000)
    images = np.zeros((len(labels), 1, 1, 3), np.uint8)
    np.savez(tmp_path / "all.npz", x_train=images, y_train=labels, x_test=images[::5], y_test=labels[::5])
    part = evidence.EXPERIMENTS["cifar10-small"].part
    part.write(tmp_path / "all.npz", tmp_path / "part.npz")
    with np.load(tmp_path / "part.npz") as file:
        assert np.bincount(file["y_train"]).tolist() == [500] * 10
        assert np.bincount(file["y_test"]).tolist() == [200] * 10
