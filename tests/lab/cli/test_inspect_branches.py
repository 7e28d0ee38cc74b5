"""`inspect --branches`: of a checkpoint, a run folder and a name; as table, JSON and picture."""

import shutil

import pytest

from foldconv.lab.train import open_network
from foldconv.lab.train.branch_table import COLUMNS
from foldconv.network.branches import branches


@pytest.fixture
def run_with_history(run_folder, tmp_path):
    """A copy of the finished run, with a branches.csv of two epochs that ends as its checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    report = branches(open_network(folder / "last.ckpt")[0])
    lines = [
        f"{epoch},{layer.name},{branch.name},{branch.share},{branch.norm},{branch.similarity},"
        f"{layer.identity_distance},"
        for epoch in (1, 2)
        for layer in report.layers
        for branch in layer.branches
    ]
    (folder / "branches.csv").write_text("\n".join([",".join(COLUMNS), *lines, ""]), encoding="utf-8")
    return folder


def test_a_trained_checkpoint(call, call_json, run_folder):
    result = call_json("inspect", run_folder / "last.ckpt", "--branches")
    assert result["architecture"] == "digits_resnet"
    for layer in result["layers"]:
        assert layer["method"] == "doconv"
        assert sum(branch["share"] for branch in layer["branches"]) == pytest.approx(1)
        assert layer["identity_distance"] > 0  # it was trained
    code, out, err = call("inspect", run_folder / "last.ckpt", "--branches")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["layer", "branch", "share", "norm", "similarity", "D", "-", "identity"]
    assert len(out.splitlines()) == 2 + 2 * len(result["layers"]) + 1


def test_a_run_folder_is_its_last_checkpoint(call_json, run_folder, run_with_history):
    alone = call_json("inspect", run_folder, "--branches")
    assert alone == call_json("inspect", run_folder / "last.ckpt", "--branches")
    assert alone["history"] == []
    rows = call_json("inspect", run_with_history, "--branches")["history"]
    assert {row["epoch"] for row in rows} == {1, 2}


def test_pictures_of_a_checkpoint_and_of_a_course(call, call_json, run_with_history, tmp_path):
    checkpoint, course = tmp_path / "checkpoint.png", tmp_path / "course.png"
    result = call_json("inspect", run_with_history / "last.ckpt", "--branches", "--plot", checkpoint)
    assert result["panels"] == ["shares", "similarity", "identity_distance"]
    code, out, _ = call("inspect", run_with_history, "--branches", "--plot", course)
    assert code == 0
    assert out.splitlines()[-1] == (
        f"{course}: shares, shares over epochs, similarity over epochs, identity_distance over epochs"
    )
    for path in (checkpoint, course):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_name_with_a_method(call_json):
    arguments = ["inspect", "digits_resnet", "--architecture-args", "width=4", "--method", "dgconv", "--branches"]
    layers = call_json(*arguments)["layers"]
    assert {layer["groups"] for layer in layers} == {1}
    assert all(gate > 0 for layer in layers for gate in layer["gates"])


def test_what_is_refused(fails, run_folder, tmp_path):
    there = tmp_path / "there.png"
    there.write_text("mine", encoding="utf-8")
    last = run_folder / "last.ckpt"
    assert "exists and is not overwritten; choose another name" in fails("inspect", last, "--branches", "--plot", there)
    assert there.read_text(encoding="utf-8") == "mine"
    nowhere = tmp_path / "no" / "a.png"
    assert "no folder" in fails("inspect", last, "--branches", "--plot", nowhere)
    assert "add --branches" in fails("inspect", last, "--plot", nowhere, code=2)
    assert "leave --input-shape out" in fails("inspect", last, "--branches", "--input-shape", 1, 8, 8, code=2)
    assert "received a folder without last.ckpt" in fails("inspect", tmp_path, "--branches")
    assert "has no foldable layer" in fails("inspect", run_folder / "folded.safetensors", "--branches")
