"""``foldconv bench`` from the outside."""

import json

import pytest

from foldconv.lab.bench import measure
from foldconv.lab.bench.config import BenchConfig

SMALL = ("bench", "digits_resnet", "--batch", "2", "--size", "8", "--steps", "1", "--methods", "doconv")


def test_measures_writes_and_draws(call, call_json, tmp_path):
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    report = call_json(*SMALL, "--out", out)
    assert json.loads(out.read_text()) == report
    assert report["results"][0]["network"] == "digits_resnet"
    assert report["command"].endswith("--out a.json")
    code, text, err = call("bench", "plot", out, "--out", picture)
    assert (code, err) == (0, "")
    assert str(picture) in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_prints_a_table_and_nothing_on_standard_error(call):
    code, text, err = call(*SMALL, "--what", "step,memory")
    assert (code, err) == (0, "")
    assert "digits_resnet 2×8" in text
    assert "plain again" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits_resnet", "--path", "cup"), "path: unknown value 'cup'; did you mean 'cpu'?"),
        (("digits_resnet", "--methods", "dconv"), "unknown method 'dconv'; did you mean 'doconv'?"),
        (("digits_resent",), "unknown architecture 'digits_resent'"),
        (("digits_resnet", "--out", "nowhere/a.json"), "nowhere/a.json: no folder nowhere to write into; create it"),
        (("plot", "nowhere.json"), "nowhere.json: No such file or directory"),
    ],
)
def test_errors_are_one_line(arguments, message, fails):
    assert message in fails("bench", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digits_resnet", "more"), "foldconv bench: unknown argument 'more'"),
        (("digits_resnet", "--batch", "8,x"), "argument --batch: expected numbers with commas between them"),
        (("digits_resnet", "--device", "cud"), "unknown value 'cud'; did you mean 'cuda'?"),
        (("plot",), "foldconv bench plot: the following arguments are required: FILE"),
        (
            ("plot", "a.json", "--steps", "3"),
            "foldconv bench plot: unknown argument '--steps'",
        ),
    ],
)
def test_wrong_usage_has_its_own_code(arguments, message, fails):
    assert message in fails("bench", *arguments, code=2)


def test_paths_of_a_network_that_nobody_named(monkeypatch, call):
    seen = []
    monkeypatch.setattr(measure, "measure", lambda config, *_: seen.append(config) or 1 / 0)
    call("bench", "--path", "auto,torch")
    assert seen == [BenchConfig("resnet18", path=("auto", "torch"))]
