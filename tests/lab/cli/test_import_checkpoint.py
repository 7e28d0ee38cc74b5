"""`import-checkpoint`: a published file becomes one that `eval`, `fold` and `inspect` understand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import foldconv
from foldconv.lab.data import evaluation_loader
from foldconv.lab.train import create_data, open_network
from foldconv.lab.zoo.repvgg import RepVGG

GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens"
WIDTHS = "widths=[.125, .125, .125, .125]"
REPVGG = ["--architecture", "plain_repvgg_a0", "--architecture-args", "depths=[1, 2, 2, 1]", WIDTHS, "num_classes=10"]
RESNET = ["--architecture", "orepa_resnet18", "--architecture-args", "depths=[1, 2, 1, 1]", "width=.125"]
RESNET += ["num_classes=10"]
NETWORKS = {  # source, network, method, layers
    "net_repvgg": ("repvgg", REPVGG, "repvgg", 7),
    "net_dbb_basic": ("dbb", RESNET, "dbb", 10),
    "net_orepa_basic": ("orepa", RESNET, "orepa", 11),
    "net_orepa_vgg": ("orepa", REPVGG, "orepa_vgg", 7),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_gives_the_logits_and_folds(call, call_json, tmp_path, name):
    source, network, method, layers = NETWORKS[name]
    out = tmp_path / "net.safetensors"
    code, text, err = call("import-checkpoint", GOLDENS / f"{name}.pth.tar", out, "--source", source, *network)
    assert (code, err, text.count("\n")) == (0, "", 1)
    assert f"{network[1]}, {layers} {method} layers, " in text
    assert os.listdir(tmp_path) == ["net.safetensors"]

    tensors = load_file(GOLDENS / f"{name}.safetensors")
    imported, description = open_network(out)
    torch.testing.assert_close(imported.double()(tensors["input"].double()), tensors["logits"], rtol=1e-6, atol=1e-6)
    assert (description["architecture"], description["method"]) == (network[1], method)
    assert description["input_shape"] == [3, 224, 224]
    folded = call_json("fold", out, tmp_path / "folded.safetensors", "--batchnorm")
    assert len(folded["layers"]) >= layers
    deployed, _ = open_network(tmp_path / "folded.safetensors")
    torch.testing.assert_close(deployed(tensors["input"]), tensors["logits"].float(), rtol=1e-4, atol=1e-4)
    shown = call_json("inspect", out, "--input-shape", 3, 64, 64)
    assert [row["method"] for row in shown["rows"]].count(method) == layers


def test_json(call_json, tmp_path):
    found = call_json(
        "import-checkpoint",
        GOLDENS / "net_repvgg.pth.tar",
        tmp_path / "a.safetensors",
        "--source",
        "repvgg",
        *REPVGG,
    )
    assert (found["source"], found["method"], found["folded_by_the_original"]) == ("repvgg", "repvgg", False)
    assert found["layers"][:2] == ["stage0.conv", "stage1.0.conv"]
    state = torch.load(GOLDENS / "net_repvgg.pth.tar", weights_only=True)["state_dict"]
    assert found["parameters"] == sum(v.numel() for k, v in state.items() if k.endswith((".weight", ".bias")))


def test_a_checkpoint_that_the_original_has_folded_can_be_evaluated(call_json, tmp_path):
    torch.manual_seed(0)
    options = {"depths": [1, 1, 1, 1], "widths": [0.125] * 4, "num_classes": 10, "in_channels": 1}
    plain = foldconv.fold(RepVGG(**options).eval(), batchnorm=True)
    state = {name.replace(".conv.", ".rbr_reparam."): value for name, value in plain.state_dict().items()}
    torch.save(state, tmp_path / "deploy.pth")
    arguments = [f"{key}={value}" for key, value in options.items()]
    network = ["--architecture", "plain_repvgg_a0", "--architecture-args", *arguments]
    out = tmp_path / "out.safetensors"
    found = call_json("import-checkpoint", tmp_path / "deploy.pth", out, "--source", "repvgg", *network)
    assert (found["method"], found["layers"], found["folded_by_the_original"]) == ("plain", [], True)
    x = torch.randn(2, 1, 64, 64)
    assert torch.equal(open_network(out)[0](x), plain(x))
    result = call_json("eval", out, "--data", "digits")
    assert (result["foldable_layers"], result["images"]) == (0, 360)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_can_be_evaluated_before_and_after_folding(call_json, fails, tmp_path, name):
    """The labels are what the imported network says, each moved by one for a quarter of the images."""
    source, network, _, layers = NETWORKS[name]
    out, sets = tmp_path / "net.safetensors", tmp_path / "set.npz"
    call_json("import-checkpoint", GOLDENS / f"{name}.pth.tar", out, "--source", source, *network)
    assert "name it with --data" in fails("eval", out)
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(40) % 10
    np.savez(sets, x_train=images, y_train=labels, x_test=images, y_test=labels)
    seen = next(iter(evaluation_loader(create_data(str(sets)))))[0]
    labels = open_network(out)[0](seen).argmax(1).numpy()
    labels[:10] = (labels[:10] + 1) % 10
    np.savez(sets, x_train=images, y_train=np.arange(40) % 10, x_test=images, y_test=labels)
    found = call_json("eval", out, "--data", sets)
    assert (found["accuracy"], found["foldable_layers"], found["input_shape"]) == (0.75, layers, [3, 32, 32])
    call_json("fold", out, tmp_path / "folded.safetensors", "--batchnorm")
    folded = call_json("eval", tmp_path / "folded.safetensors", "--data", sets)
    assert (folded["accuracy"], folded["foldable_layers"]) == (0.75, 0)


def broken(tmp_path, change):
    content = torch.load(GOLDENS / "net_repvgg.pth.tar", weights_only=True)
    change(content["state_dict"])
    torch.save(content, tmp_path / "broken.pth")
    return tmp_path / "broken.pth"


@pytest.mark.parametrize(
    ("change", "source", "network", "message"),
    [
        (lambda s: None, "repvg", REPVGG, "unknown checkpoint source 'repvg'; did you mean 'repvgg'?"),
        (lambda s: None, "dbb", REPVGG, "broken.pth: has no layer of 'dbb', but its keys are those of repvgg; pass"),
        (lambda s: None, "repvgg", ["--architecture", "plain_repvg_a0"], "did you mean 'plain_repvgg_a0'"),
        (lambda s: None, "repvgg", RESNET, "block 'stage1.0', but OREPAResNet has 2 such in Block"),
        (lambda s: None, "repvgg", REPVGG[:-1], "linear.weight (expected (1000, 64), received (10, 64))"),
        (lambda s: s.pop("module.linear.bias"), "repvgg", REPVGG, "1 missing: linear.bias; nothing was loaded"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(fails, tmp_path, change, source, network, message):
    path = broken(tmp_path, change)
    assert message in fails("import-checkpoint", path, tmp_path / "out", "--source", source, *network)
    assert not (tmp_path / "out").exists()


def test_options_of_the_method(call_json, fails, tmp_path):
    arguments = [GOLDENS / "net_repvgg.pth.tar", tmp_path / "out", "--source", "repvgg", *REPVGG]
    assert "unknown option 'sort'" in fails("import-checkpoint", *arguments, "--method-args", "sort=true")
    call_json("import-checkpoint", *arguments, "--method-args", "custom_l2=0.5")
    network, _ = open_network(tmp_path / "out")
    assert network.stage0.conv.method == foldconv.RepVGG(custom_l2=0.5)


def test_source_and_architecture_are_asked_for(fails):
    message = fails("import-checkpoint", "a.pth", "b.safetensors", code=2)
    assert "foldconv import-checkpoint: the following arguments are required: --source, --architecture" in message


def test_an_existing_file_is_not_overwritten(fails, tmp_path):
    (tmp_path / "out").write_text("mine")
    path = GOLDENS / "net_repvgg.pth.tar"
    message = fails("import-checkpoint", path, tmp_path / "out", "--source", "repvgg", *REPVGG)
    assert "file exists and is not overwritten" in message
    assert (tmp_path / "out").read_text() == "mine"


def test_hostile_and_missing_files(fails, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    torch.save({"state_dict": {"a.rbr_dense.conv.weight": torch.ones(1)}, "x": Evil()}, tmp_path / "evil.pth")
    for name, message in {"evil.pth": "refused, since reading it would run code", "no.pth": "no such file"}.items():
        assert message in fails("import-checkpoint", tmp_path / name, tmp_path / "out", "--source", "repvgg", *REPVGG)
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()
