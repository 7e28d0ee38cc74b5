"""The picture shows what the files hold."""

import json

import pytest

from foldconv.errors import UnsupportedError
from foldconv.lab.bench.measure import FORMAT
from foldconv.lab.bench.plot import plot


def ratio(median):
    return {"median": median, "lower": median - 0.25, "upper": median + 0.25}


def step(batch, size, **medians):
    ratios = {"plain": ratio(1.0), **{name: ratio(value) for name, value in medians.items()}}
    return {"what": "step", "network": "net", "batch": batch, "size": size, "ratios": ratios}


@pytest.fixture
def write(tmp_path):
    def file(name, *results, format=FORMAT):
        path = tmp_path / name
        path.write_text(json.dumps({"format": format, "results": list(results)}))
        return path

    return file


def test_points_of_several_files_are_one_line_in_order_of_work(write, tmp_path):
    large = write("large.json", step(8, 32, doconv=1.5, floor=1.25))
    small = write("small.json", step(2, 16, doconv=3.0, dbb=4.0), {"what": "fold", "network": "net"})
    lines = plot([large, small], tmp_path / "a.png")
    assert lines["net: doconv"] == [(512.0, 3.0, 2.75, 3.25), (8192.0, 1.5, 1.25, 1.75)]
    assert lines["net: dbb"] == [(512.0, 4.0, 3.75, 4.25)]
    assert lines["net: floor"] == [(8192.0, 1.25, 1.0, 1.5)]
    assert "net: plain" not in lines
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a file of foldconv bench: no JSON"),
        ("[]", "expected format 'foldconv-bench-1', received None"),
        ('{"format": "other"}', "received 'other'"),
        (json.dumps({"format": FORMAT, "results": [{"what": "fold"}]}), "nothing to draw: no training steps in "),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UnsupportedError, match=message):
        plot([path], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
