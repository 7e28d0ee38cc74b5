"""`eval`, `fold` and `inspect`: every kind of file, good and bad."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import foldconv
from foldconv.lab import zoo
from foldconv.lab.train import TrainConfig, create_data, evaluate, fit, open_network

WIDTH = ["--architecture", "digits_resnet", "--architecture-args", "width=4", "in_channels=1"]


@pytest.fixture(scope="module")
def expected(run_folder):
    return json.loads((run_folder / "result.json").read_text())


def assert_complete(result, expected):
    assert result["accuracy"] == expected["accuracy_folded"]
    assert (result["architecture"], result["data"], result["images"]) == ("digits_resnet", "digits", 360)


# ---------------------------------------------------------------------- eval


def test_eval_of_the_checkpoint_and_the_folded_weights(call_json, run_folder, expected):
    rich = call_json("eval", run_folder / "last.ckpt")
    plain = call_json("eval", run_folder / "folded.safetensors")
    assert_complete(rich, expected)
    assert_complete(plain, expected)
    assert (rich["foldable_layers"], plain["foldable_layers"]) == (7, 0)
    assert (rich["parameters"], plain["parameters"]) == (expected["parameters_training"], expected["parameters_folded"])


def test_a_run_that_has_not_ended_is_told(call, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    assert call("eval", tmp_path / "run")[2] == ""
    (tmp_path / "run" / "result.json").unlink()
    code, _, said = call("eval", tmp_path / "run")
    assert code == 0
    assert said == f"foldconv: {tmp_path / 'run'}: this run has not ended; what follows is of its last checkpoint\n"


def test_eval_runs_no_code_that_a_file_names_as_its_data(fails, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    description = {"architecture": "digits_resnet", "data": "trap:Data"}
    foldconv.save(zoo.create("digits_resnet"), tmp_path / "a.safetensors", extra=description)
    assert "names 'trap:Data' as its data, whose code would run; if you trust it, give --data" in fails(
        "eval", tmp_path / "a.safetensors"
    )


def test_eval_of_a_saved_expanded_network(call_json, run_folder, expected, tmp_path):
    network, description = open_network(run_folder / "last.ckpt")
    foldconv.save(network, tmp_path / "rich.safetensors", extra=description)
    result = call_json("eval", tmp_path / "rich.safetensors")
    assert_complete(result, expected)
    assert result["foldable_layers"] == 7


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_eval_of_bare_weights(call_json, fails, run_folder, expected, tmp_path, name):
    tensors = load_file(run_folder / "folded.safetensors")
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    fails("eval", tmp_path / name)
    assert "name it with --data" in fails("eval", tmp_path / name, *WIDTH)
    assert_complete(call_json("eval", tmp_path / name, *WIDTH, "--data", "digits"), expected)


def test_eval_asks_for_the_architecture(fails, tmp_path):
    foldconv.save(zoo.create("digits_resnet"), tmp_path / "a.safetensors")
    torch.save(zoo.create("digits_resnet").state_dict(), tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        assert "name it with --architecture" in fails("eval", tmp_path / name)


def test_eval_on_other_data(call, call_json, fails, run_folder, tmp_path):
    """The test images of an npz file, resized to what the network takes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 12, 12), dtype=np.uint8)
    labels = np.arange(40) % 10
    path = tmp_path / "other.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:30], y_test=labels[:30])
    result = call_json("eval", run_folder / "last.ckpt", "--data", path, "--image-size", 8, "--workers", 0)
    assert (result["images"], result["images_skipped"], result["data"]) == (30, 0, str(path))
    for words, count in ((["--holdout", "7"], 7), (["--holdout", "--no-normalize"], 30)):
        result = call_json("eval", run_folder / "last.ckpt", "--data", path, "--image-size", 8, *words)
        assert result["images"] == count
    np.savez(path, x_train=images, y_train=labels % 5, x_test=images, y_test=labels % 5)
    assert "made for 10 classes" in fails("eval", run_folder / "last.ckpt", "--data", path)
    assert "nowhere.npz" in fails("eval", run_folder / "last.ckpt", "--data", tmp_path / "nowhere.npz", "--no-download")


def test_eval_holds_out_and_normalizes_as_training_did(call_json, tmp_path):
    rng = np.random.default_rng(0)
    images = {
        split: rng.integers(0, 256, (count, 8, 8), dtype=np.uint8) for split, count in (("train", 40), ("test", 9))
    }
    labels = {split: np.arange(len(each)) % 10 for split, each in images.items()}
    np.savez(
        tmp_path / "set.npz", **{f"x_{k}": v for k, v in images.items()}, **{f"y_{k}": v for k, v in labels.items()}
    )
    run = tmp_path / "run"
    options = [
        "--data",
        tmp_path / "set.npz",
        "--holdout",
        "13",
        "--no-normalize",
        "--out",
        run,
        "--epochs",
        "2",
        "--no-baseline",
    ]
    trained = call_json("train", *options, "--architecture-args", "width=4", "--batch-size", "8")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "folded.safetensors").read_bytes())
    for file in (run, alone):
        found = call_json("eval", file)
        assert (found["images"], found["accuracy"]) == (13, trained["accuracy_folded"])
    losses = [call_json("eval", alone, *words)["loss"] for words in ([], ["--no-normalize"], ["--normalize"])]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_folder_stands_for_its_last_checkpoint(call_json, run_folder, tmp_path, expected):
    assert_complete(call_json("eval", run_folder), expected)
    folded = call_json("fold", run_folder, tmp_path / "deploy.safetensors")
    assert (folded["source"], folded["parameters_after"]) == (str(run_folder), expected["parameters_folded"])
    assert call_json("inspect", run_folder)["parameters_training"] == expected["parameters_training"]


@pytest.fixture
def small_images(tmp_path):
    """A run on a folder of images at 12 pixels, of which one in val/ cannot be read, by a config in a run folder."""
    from PIL import Image

    for split in ("train", "val"):
        for label, shade in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / shade
            folder.mkdir(parents=True)
            for i in range(3):
                size = (20 + i, 16)
                Image.effect_noise(size, 40 + 60 * label).convert("RGB").save(folder / f"{i}.png")
    (tmp_path / "images" / "val" / "dark" / "0.png").write_bytes(b"no image")
    run = tmp_path / "run"
    config = TrainConfig(
        data=str(tmp_path / "images"),
        architecture_args={"width": 4},
        image_size=12,
        corrupt_images="skip",
        epochs=1,
        batch_size=4,
        accelerator="cpu",
        out=str(run),
    )
    return run, fit(config, Console(quiet=True))


def test_eval_takes_the_data_as_training_did(call, call_json, fails, small_images, tmp_path):
    """Size and what to do about unreadable images; a file that was moved away still tells the size."""
    run, trained = small_images
    found = call_json("eval", run)
    assert (found["accuracy"], found["input_shape"]) == (trained.accuracy_folded, [3, 12, 12])
    assert (found["images"], found["images_skipped"]) == (5, 1)
    shutil.copy(run / "folded.safetensors", tmp_path / "moved.safetensors")
    assert "0.png: expected an image" in fails("eval", tmp_path / "moved.safetensors")
    assert "0.png: expected an image" in fails("eval", run, "--corrupt-images", "error")
    good = tmp_path / "images" / "val" / "dark" / "1.png"
    shutil.copy(good, good.with_name("0.png"))
    assert call_json("eval", tmp_path / "moved.safetensors")["input_shape"] == [3, 12, 12]
    elsewhere = call_json("eval", tmp_path / "moved.safetensors", "--data", tmp_path / "images")
    assert elsewhere["input_shape"] == [3, 12, 12]
    assert call_json("eval", run, "--image-size", 16)["input_shape"] == [3, 16, 16]
    assert ", 12x12; " in call("eval", run)[1]


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_eval_on_a_device_that_is_not_there(fails, run_folder, device):
    message = fails("eval", run_folder, "--device", device)
    assert f"--device {device}: expected one that can be used here (cpu" in message


def test_eval_looks_for_data_where_training_found_them(call_json, fails, run_folder, tmp_path, monkeypatch):
    """A run on a named set in a folder of its own is evaluated there, and nothing is downloaded into ./data."""
    monkeypatch.chdir(tmp_path)
    images = np.zeros((20, 28, 28), np.uint8)
    (tmp_path / "sets").mkdir()
    labels = np.arange(20) % 10
    np.savez(tmp_path / "sets" / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    settings = {"architecture_args": {"width": 4}, "epochs": 1, "batch_size": 20, "accelerator": "cpu"}
    fit(TrainConfig(data="mnist", data_folder="sets", download=False, out="run", **settings), Console(quiet=True))
    assert call_json("eval", "run/last.ckpt")["images"] == 20
    shutil.move("run/last.ckpt", "alone.ckpt")
    assert "data: expected the data set mnist" in fails("eval", "alone.ckpt", "--no-download")


def test_eval_prints_a_line(call, run_folder, expected):
    code, out, err = call("eval", run_folder / "last.ckpt")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert f"test accuracy {100 * expected['accuracy_folded']:.2f} %" in out


def test_eval_of_another_number_of_classes(fails, tmp_path):
    network = zoo.create("digits_resnet", num_classes=7)
    extra = {"architecture": "digits_resnet", "architecture_args": {"num_classes": 7}, "data": "digits"}
    foldconv.save(network, tmp_path / "seven.safetensors", extra=extra)
    message = "seven.safetensors: made for 7 classes; 'digits' has 10"
    assert message in fails("eval", tmp_path / "seven.safetensors")
    foldconv.save(network, tmp_path / "bare.safetensors", extra={**extra, "architecture_args": {}})
    assert "does not fit" in fails("eval", tmp_path / "bare.safetensors")


def test_evaluate_counts_right_answers():
    data = create_data("digits")

    class Oracle(torch.nn.Module):
        """Knows every label but those of the first ten images."""

        def forward(self, images):
            assert not self.training
            known = {image.numpy().tobytes(): label for image, label in zip(*data.test.tensors)}
            labels = torch.stack([known[image.numpy().tobytes()] for image in images])
            labels[:10] = (labels[:10] + (len(images) == 256)) % 10
            return torch.nn.functional.one_hot(labels, 10) * 1000.0

    oracle = Oracle()
    found = evaluate(oracle, data)
    assert found["accuracy"] == 350 / 360
    assert found["loss"] == pytest.approx(1000 * 10 / 360)
    assert oracle.training


# ---------------------------------------------------------------------- files that are not what they seem


class Evil:
    """Unpickling it creates a file: the proof that code ran."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


COMMANDS = [["eval"], ["fold", "OUT.pth"], ["inspect"]]


def all_commands(fails, path, tmp_path):
    for command, *rest in COMMANDS:
        yield fails(command, path, *(tmp_path / word for word in rest), *WIDTH)
    assert not (tmp_path / "OUT.pth").exists()


@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_hostile_files_run_no_code(fails, tmp_path, writer):
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    writer({"state_dict": {}, "foldconv": Evil(str(marker))}, path)
    for message in all_commands(fails, path, tmp_path):
        assert "evil.ckpt" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(str(marker)))).close()
    assert marker.exists()  # the trap works


def test_a_file_cannot_make_us_read_another_one(call, fails, tmp_path):
    """timm unpickles the file that its option checkpoint_path names."""
    marker, evil = tmp_path / "marker", tmp_path / "evil.pth"
    torch.save({"state_dict": Evil(str(marker))}, evil)
    network = zoo.create("timm/test_byobnet", num_classes=2)
    extra = {"architecture": "timm/test_byobnet", "architecture_args": {"num_classes": 2, "checkpoint_path": str(evil)}}
    foldconv.save(network, tmp_path / "a.safetensors", extra=extra)
    torch.save({"foldconv": {**extra, "layers": {}}, "state_dict": {}}, tmp_path / "b.ckpt")
    assert call("inspect", tmp_path / "a.safetensors", "--input-shape", 3, 32, 32)[0] == 0
    assert "does not fit" in fails("inspect", tmp_path / "b.ckpt")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["last.ckpt", "folded.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_truncated_files(fails, run_folder, tmp_path, name, keep):
    content = (run_folder / name).read_bytes()
    (tmp_path / name).write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    for message in all_commands(fails, tmp_path / name, tmp_path):
        assert name in message


def test_a_flipped_bit(fails, run_folder, tmp_path):
    """In a number that is read, but not looked at: the network would still work, if worse."""
    content = bytearray((run_folder / "last.ckpt").read_bytes())
    weight = torch.load(run_folder / "last.ckpt", weights_only=True)["state_dict"]["network.head.weight"]
    place = content.find(weight.numpy().tobytes())
    assert place > 0
    content[place + 3] ^= 64
    (tmp_path / "last.ckpt").write_bytes(content)
    for message in all_commands(fails, tmp_path / "last.ckpt", tmp_path):
        assert "last.ckpt: damaged: the checksum of its record" in message


@pytest.mark.parametrize("content", [[1, 2], {"foldconv": 3}, {"foldconv": {"architecture": 3}}, {"foldconv": {}}])
def test_checkpoints_of_another_structure(fails, tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    for command, *rest in COMMANDS:
        assert "other.ckpt" in fails(command, tmp_path / "other.ckpt", *(tmp_path / word for word in rest))


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"architecture_args": {"width": 10**6}}, "does not fit SmallResNet; 16 missing or misshapen: stem.0.weight ("),
        ({"architecture_args": {"width": 4, "num_classes": 10**9}}, "head.weight (expected (1000000000, 16), received"),
        ({"architecture_args": {"width": 4, "depth": 10**7 + 4}}, "which has more than"),
        ({"architecture": "vit_giant_patch14_224", "architecture_args": {}}, "which has more than"),
        ({"architecture": "resnet_18"}, "unknown architecture 'resnet_18'; did you mean 'resnet18'"),
        ({"architecture_args": {"width": 4, "name": "x"}}, "cannot be built with the options it gives"),
        ({"input_shape": [1, 10**6, 10**6]}, "input_shape: expected [channels, height, width], received [1, 1000000,"),
        ({"input_shape": "8x8"}, "input_shape: expected [channels, height, width], received '8x8'"),
        (
            {"layers": {"stem.0": {"method": "doconv", "depth_multiplier": 10**9}}},
            "stem.0.D (expected (1, 9, 1000000000)",
        ),
    ],
)
def test_what_a_file_claims_is_compared_before_it_is_built(fails, run_folder, tmp_path, claims, message):
    """Built, each of these networks would take minutes, or more memory than there is."""
    content = torch.load(run_folder / "last.ckpt", weights_only=True)
    description = {**content["foldconv"], **claims}
    torch.save({**content, "foldconv": description}, tmp_path / "a.ckpt")
    assert message in fails("eval", tmp_path / "a.ckpt")
    if "layers" not in claims:
        network, _ = open_network(run_folder / "last.ckpt")
        extra = {key: value for key, value in description.items() if key != "layers"}
        foldconv.save(network, tmp_path / "a.safetensors", extra=extra)
        assert message in fails("eval", tmp_path / "a.safetensors")


def test_images_that_a_network_does_not_take(fails, run_folder, tmp_path):
    content = torch.load(run_folder / "last.ckpt", weights_only=True)
    torch.save({**content, "foldconv": {**content["foldconv"], "input_shape": [3, 8, 8]}}, tmp_path / "a.ckpt")
    for command, *rest in (["fold", tmp_path / "out.pt"], ["inspect"]):
        message = fails(command, tmp_path / "a.ckpt", *rest)
        assert "a.ckpt: cannot evaluate images of shape (3, 8, 8): Given groups=1" in message
    assert not (tmp_path / "out.pt").exists()


def test_missing_file_and_folder(fails, tmp_path):
    for message in all_commands(fails, tmp_path / "nowhere.ckpt", tmp_path):
        assert "nowhere.ckpt: no such file" in message
    for message in all_commands(fails, tmp_path, tmp_path):
        assert "expected a checkpoint or a run folder, received a folder without last.ckpt" in message


def test_checkpoint_of_another_network(fails, run_folder):
    message = fails(
        "eval", run_folder / "last.ckpt", "--architecture", "digits_resnet", "--architecture-args", "width=8"
    )
    assert "does not fit SmallResNet" in message
    assert "misshapen" in message


# ---------------------------------------------------------------------- fold


@pytest.mark.parametrize("batchnorm", [False, True])
def test_fold_writes_a_network_that_computes_the_same(call, call_json, run_folder, tmp_path, expected, batchnorm):
    out = tmp_path / "deploy.safetensors"
    code, text, err = call("fold", run_folder / "last.ckpt", out, *(["--batchnorm"] if batchnorm else []))
    assert (code, err) == (0, "")
    assert "stem.0" in text
    assert "whole network" in text
    assert "max error" in text
    assert sorted(os.listdir(tmp_path)) == ["deploy.report.json", out.name]
    assert_complete(call_json("eval", out), expected)
    norms = [name for name in load_file(out) if "running_mean" in name]
    assert len(norms) == (0 if batchnorm else 9)


def test_fold_json(call_json, run_folder, tmp_path, expected):
    result = call_json("fold", run_folder / "last.ckpt", tmp_path / "deploy.safetensors")
    assert [layer["name"] for layer in result["layers"]][:2] == ["stem.0", "blocks.0.conv1"]
    assert 0 < result["max_error"] < 1e-4
    assert result["parameters_before"] == expected["parameters_training"]
    assert result["parameters_after"] == expected["parameters_folded"]


def test_fold_writes_its_verification_beside_it(call_json, fails, run_folder, tmp_path):
    result = call_json("fold", run_folder / "last.ckpt", tmp_path / "deploy.safetensors", "--batchnorm")
    report = json.loads((tmp_path / "deploy.report.json").read_text())
    assert report == result
    assert report["architecture_args"]["width"] == 4
    assert (report["batchnorm_folded"], report["input_shape"]) == (True, [1, 8, 8])
    (tmp_path / "deploy.safetensors").unlink()
    message = fails("fold", run_folder / "last.ckpt", tmp_path / "deploy.safetensors")
    assert "deploy.report.json: file exists and is not overwritten" in message
    assert not (tmp_path / "deploy.safetensors").exists()


def test_fold_twice_changes_nothing(call_json, run_folder, tmp_path):
    for source, target in (
        (run_folder / "last.ckpt", "a"),
        (tmp_path / "a.safetensors", "b"),
        (tmp_path / "b.safetensors", "c"),
    ):
        call_json("fold", source, tmp_path / f"{target}.safetensors", "--batchnorm")
    first, last = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_fold_writes_what_the_suffix_says(call_json, fails, run_folder, tmp_path):
    call_json("fold", run_folder, tmp_path / "a.safetensors")
    call_json("fold", run_folder, tmp_path / "b.pth")
    expected, found = load_file(tmp_path / "a.safetensors"), torch.load(tmp_path / "b.pth", weights_only=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)
    message = fails("fold", run_folder, tmp_path / "c.onnx")
    assert "c.onnx: expected a name that ends in .safetensors, .pt, .pth, received .onnx" in message
    assert "foldconv export" in message


def test_fold_never_overwrites(fails, run_folder, tmp_path):
    out = tmp_path / "deploy.safetensors"
    out.write_text("mine")
    assert "deploy.safetensors: file exists and is not overwritten" in fails("fold", run_folder / "last.ckpt", out)
    assert out.read_text() == "mine"


def test_fold_into_a_missing_folder(fails, run_folder, tmp_path):
    message = fails("fold", run_folder / "last.ckpt", tmp_path / "nowhere" / "x.safetensors")
    assert f"no folder {tmp_path / 'nowhere'} to write into" in message


def test_fold_on_a_full_disk_leaves_nothing(fails, run_folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foldconv.files.atomic.os.fsync", full)
    assert "the disk is full" in fails("fold", run_folder / "last.ckpt", tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_fold_refuses_a_difference(fails, run_folder, tmp_path, monkeypatch):
    original = foldconv.fold

    def wrong(model, **options):
        folded = original(model, **options)
        folded.head.bias.data += 1
        return folded

    monkeypatch.setattr("foldconv.network.fold.fold", wrong)
    assert "the folded network differs by 1.0e+00" in fails(
        "fold", run_folder / "last.ckpt", tmp_path / "x.safetensors"
    )
    assert os.listdir(tmp_path) == []


def test_fold_refuses_nan(fails, run_folder, tmp_path):
    checkpoint = torch.load(run_folder / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.blocks.0.conv1.weight"][0, 0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    assert "blocks.0.conv1" in fails("fold", tmp_path / "nan.ckpt", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# ---------------------------------------------------------------------- inspect


def test_inspect_a_checkpoint(call, call_json, run_folder, expected):
    result = call_json("inspect", run_folder / "last.ckpt")
    names = ("parameters_training", "parameters_folded", "macs_training", "macs_folded")
    assert [result[name] for name in names] == [expected[name] for name in names]
    assert [row["method"] for row in result["rows"]].count("doconv") == 7
    code, out, err = call("inspect", run_folder / "last.ckpt")
    assert (code, err) == (0, "")
    assert f"{expected['macs_training']:,}" in out
    assert "blocks.2.conv2" in out


def test_inspect_an_architecture(call_json):
    plain = call_json("inspect", "digits_resnet", "--architecture-args", "width=8")
    rich = call_json("inspect", "digits_resnet", "--architecture-args", "width=8", "--method", "doconv")
    wider = call_json(
        "inspect",
        "digits_resnet",
        "--method",
        "doconv",
        "--architecture-args",
        "width=8",
        "--method-args",
        "depth_multiplier=12",
    )
    assert plain["parameters_training"] == rich["parameters_folded"] == wider["parameters_folded"]
    assert plain["parameters_training"] < rich["parameters_training"] < wider["parameters_training"]


def test_inspect_other_peoples_networks(call_json):
    assert call_json("inspect", "timm/resnet18")["parameters_training"] == 11_689_512
    small = call_json("inspect", "torchvision/squeezenet1_1", "--input-shape", 3, 64, 64)
    assert small["input_shape"] == [1, 3, 64, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits_resnt"], "did you mean 'digits_resnet'?"),
        (["digits_resnet", "--method", "docon"], "unknown method 'docon'; did you mean 'doconv'?"),
        (["digits_resnet", "--architecture-args", "widht=3"], "unknown option 'widht'; did you mean 'width'?"),
        (
            ["digits_resnet", "--architecture-args", "zz=3"],
            "unknown option 'zz'; expected one of: depth, width, num_classes",
        ),
        (
            ["resnet18", "--architecture-args", "drop_rat=3"],
            "'resnet18': unknown option 'drop_rat'; did you mean 'drop_rate'?",
        ),
        (
            ["resnet18", "--architecture-args", "avg_dwn=3"],
            "'resnet18': unknown option 'avg_dwn'; did you mean 'avg_down'?",
        ),
        (
            ["torchvision/resnet18", "--architecture-args", "width_per_grop=3"],
            "unknown option 'width_per_grop'; did you mean 'width_per_group'?",
        ),
        (["digits_resnet", "--architecture-args", "width=[]"], "does not take these options, received {'width': []}"),
        (["digits_resnet", "--architecture-args", "width=-4"], "does not take these options, received {'width': -4}"),
        (["digits_resnet", "--architecture-args", "width=0"], "{'width': 0}: nothing is left of stem.0.weight"),
        (
            ["digits_resnet", "--method", "doconv", "--method-args", "depth_multiplir=9"],
            "'doconv': unknown option 'depth_multiplir'; did you mean 'depth_multiplier'?",
        ),
        (["nowhere.safetensors"], "nowhere.safetensors: no such file"),
    ],
)
def test_inspect_bad_names(arguments, message, fails):
    assert message in fails("inspect", *arguments)


def test_options_that_would_be_passed_over(fails, run_folder):
    """Options of a network or method that nobody named would have no effect."""
    for command in (["eval", run_folder], ["fold", run_folder, run_folder / "new.pth"], ["inspect", run_folder]):
        message = fails(*command, "--architecture-args", "width=8")
        assert "architecture_args (width) need the architecture that they are for" in message
    message = fails("inspect", "digits_resnet", "--method-args", "depth_multiplier=9", code=2)
    assert "name it with --method" in message
