import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import foldconv
from foldconv.lab.cli import main
from foldconv.lab.data.preprocessing import described, prepare

STEPS = described((3, 8, 8), (0.2, 0.3, 0.4), (0.5, 0.6, 0.7), 9)
NAMES = list("abcdefghij")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network that says how images are prepared, and its file."""
    torch.manual_seed(0)
    args = {"width": 4, "in_channels": 3}
    network = foldconv.zoo.create("digits_resnet", **args).eval()
    path = tmp_path_factory.mktemp("predict") / "w.safetensors"
    described = {"architecture": "digits_resnet", "architecture_args": args, "input_shape": [3, 8, 8]}
    foldconv.save(network, path, extra=described | {"classes": NAMES, "preprocessing": STEPS})
    return network, path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in (("b.png", (12, 20)), ("a.jpg", (30, 9))):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_predictions_are_the_networks(weights, photos, capsys, tmp_path):
    network, path = weights
    assert main(["predict", str(path), str(photos), "--top", "3", "--json", "--picture", str(tmp_path / "p.png")]) == 0
    found = json.loads(capsys.readouterr().out)["images"]
    assert [each["image"] for each in found] == [str(photos / "a.jpg"), str(photos / "b.png")]
    for each in found:
        with Image.open(each["image"]) as image:
            chances = network(prepare(image.convert("RGB"), STEPS)).softmax(1).flatten()
        best = chances.topk(3)
        assert [p["index"] for p in each["predictions"]] == best.indices.tolist()
        assert [p["class"] for p in each["predictions"]] == [NAMES[i] for i in best.indices]
        assert [p["probability"] for p in each["predictions"]] == pytest.approx(best.values.tolist(), rel=1e-4)
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] > 200


@pytest.mark.parametrize("name", ["p", "p.jpg"])
def test_a_picture_is_called_what_it_is(weights, photos, fails, tmp_path, name):
    said = fails("predict", weights[1], photos, "--picture", tmp_path / name)
    assert said == f"foldconv: error: {tmp_path / name}: expected a name that ends in .png; choose such a name"


def test_an_exported_file_predicts_the_same(weights, photos, capsys, monkeypatch, tmp_path):
    _, path = weights
    out = tmp_path / "net.pt2"
    assert main(["export", str(path), str(out)]) == 0
    capsys.readouterr()
    for model in (path, out):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((photos / "b.png").read_bytes())))
        assert main(["predict", str(model), "-", "--json"]) == 0
    lines = capsys.readouterr().out.split("}\n{")
    ours, theirs = (json.loads("{" * (i > 0) + line + "}" * (i == 0)) for i, line in enumerate(lines))
    for left, right in zip(ours["images"][0]["predictions"], theirs["images"][0]["predictions"]):
        assert left["class"] == right["class"]
        assert left["probability"] == pytest.approx(right["probability"], rel=1e-4)


def test_what_cannot_be_predicted(weights, photos, capsys, tmp_path):
    network, path = weights
    plain = tmp_path / "plain.safetensors"
    named = {"architecture": "digits_resnet", "architecture_args": {"width": 4, "in_channels": 3}}
    foldconv.save(network, plain, extra=named)
    damaged = tmp_path / "damaged.safetensors"
    foldconv.save(network, damaged, extra=named | {"preprocessing": {**STEPS, "std": [0, 1, 1]}})
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange.pt2").write_text("no program")
    for arguments, message in (
        ((plain, photos), "does not say how images are prepared"),
        ((damaged, photos), "preprocessing: std: expected 3 numbers, received [0, 1, 1]"),
        ((path, tmp_path / "text.png"), "text.png: expected an image, received a file of no known format"),
        ((path, tmp_path / "none.png"), "none.png: no such file or folder; expected images, or folders of them"),
        ((path, tmp_path / "empty"), "expected images in this folder, found none"),
        ((tmp_path / "strange.pt2", photos), "strange.json: expected a description of what was exported"),
        ((tmp_path / "none.pt2", photos), "none.pt2: no such file"),
    ):
        assert main(["predict", *map(str, arguments)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
