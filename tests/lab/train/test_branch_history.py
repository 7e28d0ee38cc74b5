"""branches.csv: a row per epoch, layer and branch, the same after a resume, and pictures of it."""

import io

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import foldconv
from foldconv.errors import CheckpointError, UnsupportedError
from foldconv.lab.run import RunFolder
from foldconv.lab.train import TrainConfig
from foldconv.lab.train.branch_plot import plot_branches
from foldconv.lab.train.branch_table import COLUMNS, read_branches
from foldconv.lab.train.devices import launch, quiet_lightning
from foldconv.lab.train.loop import Training
from foldconv.lab.train.records import Records
from foldconv.network.branches import branches


def train(folder, epochs, method="doconv", checkpoint=None):
    """Train two expanded layers into a folder; the module afterwards."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.Flatten(),
        nn.Linear(144, 10),
    )
    net = net if method is None else foldconv.expand(net, method, init="paper")
    config = TrainConfig(track_branches=True, schedule="constant", epochs=epochs, batch_size=479, accelerator="cpu")
    start = checkpoint and (checkpoint, torch.load(checkpoint, weights_only=True))
    run = RunFolder(folder)
    with quiet_lightning():
        training = Training(net, config, config.open_data(), launch(config), run.checkpoint, start)
        records = Records(training, {}, run, Console(file=io.StringIO()), start)
        while training.epoch < epochs:
            records.epoch()
    return training.module


def test_a_row_per_epoch_layer_and_branch(tmp_path):
    module = train(tmp_path, 2)
    rows = read_branches(tmp_path / "branches.csv")
    assert [(row["epoch"], row["layer"], row["branch"]) for row in rows] == [
        (epoch, layer, branch) for epoch in (0, 1, 2) for layer in ("0", "3") for branch in ("identity", "D")
    ]
    assert [row["identity_distance"] for row in rows[:4]] == [0, 0, 0, 0]
    assert 0 < rows[4]["identity_distance"] < rows[8]["identity_distance"]
    # The last rows are what the trained network has.
    now = [(branch, layer) for layer in branches(module.network).layers for branch in layer.branches]
    for row, (branch, layer) in zip(rows[-4:], now):
        assert row["share"] == pytest.approx(branch.share, rel=1e-5)
        assert row["norm"] == pytest.approx(branch.norm, rel=1e-5)
        assert row["similarity"] == pytest.approx(branch.similarity, rel=1e-5)
        assert row["identity_distance"] == pytest.approx(layer.identity_distance, rel=1e-5)
        assert row["groups"] is None


def test_a_resumed_run_has_the_rows_of_an_undisturbed_one(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train(tmp_path / "whole", 3)
    for checkpoint in ("last.ckpt", "previous.ckpt"):  # after an epoch, and before the first
        train(tmp_path / "parts", 1)
        (tmp_path / "parts" / "branches.csv").write_text("cut off while it was written", encoding="utf-8")
        train(tmp_path / "parts", 3, checkpoint=tmp_path / "parts" / checkpoint)
        whole, parts = ((tmp_path / name / "branches.csv").read_text() for name in ("whole", "parts"))
        assert parts == whole
    assert len(whole.splitlines()) == 1 + 4 * 4


def test_learned_groups_are_in_the_table(tmp_path):
    train(tmp_path, 1, method="dgconv")
    rows = read_branches(tmp_path / "branches.csv")
    assert {row["groups"] for row in rows} <= {1, 2, 4}
    assert {row["similarity"] for row in rows} == {None}


def test_a_plain_network_is_refused_before_training(tmp_path):
    with pytest.raises(UnsupportedError, match="has no foldable layer"):
        train(tmp_path, 1, method=None)


HEAD = ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns epoch,layer,.*received nothing"),
        ("epoch,loss\n1,2\n", "expected the columns .*received epoch,loss"),
        (f"{HEAD}\n1,conv,D,a lot,1,1,1,1\n", "damaged, a row does not fit its columns: .*'a lot'"),
        (f"{HEAD}\n1,conv\n", "damaged, a row does not fit its columns: no branch"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    path = tmp_path / "branches.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_branches(path)


PANELS = {
    "orepa": ["shares", "shares over epochs", "similarity over epochs"],
    "doconv": ["shares", "shares over epochs", "similarity over epochs", "identity_distance over epochs"],
    "dgconv": ["groups", "groups over epochs"],
    "expandnet": ["shares"],
}


@pytest.mark.parametrize("method", PANELS)
def test_pictures(method, tmp_path):
    module = train(tmp_path, 1, method)
    report, history = branches(module.network), read_branches(tmp_path / "branches.csv")
    assert plot_branches(report, tmp_path / "course.png", method, history) == PANELS[method]
    alone = list(dict.fromkeys(name.removesuffix(" over epochs") for name in PANELS[method]))
    assert plot_branches(report, tmp_path / "alone.png", method) == alone
    for name in ("course", "alone"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(FileExistsError, match="not overwritten; choose another name"):
        plot_branches(report, tmp_path / "alone.png", method)


def test_the_picture_of_learned_groups_has_their_numbers(tmp_path, monkeypatch):
    """Bars as long as the logarithm, before what the layer could have learned, and lines over the epochs."""
    figures = []

    class Kept(Figure):
        def __init__(self, **settings):
            super().__init__(**settings)
            figures.append(self)

    monkeypatch.setattr("foldconv.lab.train.branch_plot.Figure", Kept)
    net = foldconv.expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)), "dgconv")
    with torch.no_grad():
        net[0].gates.copy_(torch.tensor([1.0, -1.0, -1.0]))
    history = [
        {"layer": "0", "epoch": epoch, "groups": groups, **dict.fromkeys(("share", "similarity", "identity_distance"))}
        for epoch, groups in enumerate((1, 8, 4))
    ]
    plot_branches(branches(net), tmp_path / "a.png", "title", history)
    bars, lines = figures[0].axes
    possible, learned = ([bar.get_width() for bar in bars.containers[i]] for i in (0, 1))
    assert (possible, learned) == ([3, 2], [2, 0])
    assert [text.get_text() for text in bars.texts] == ["4", "1"]
    assert bars.xaxis.get_major_formatter()(3) == "8"
    assert list(lines.lines[0].get_ydata()) == [0, 3, 2]
    assert lines.yaxis.get_major_formatter()(3) == "8"
