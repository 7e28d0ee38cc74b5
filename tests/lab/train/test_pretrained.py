"""Runs that start from trained weights: any kind of checkpoint, also for another number of classes."""

import pytest
import torch
from safetensors.torch import load_file

import foldconv
from foldconv.errors import CheckpointError
from foldconv.lab import zoo
from foldconv.lab.train import create_data, evaluate
from foldconv.lab.train.building import build, start_from


def settings(path, **more):
    return {"pretrained": str(path), "init": "preserve", **more}


@pytest.mark.parametrize("name", ["last.ckpt", "folded.safetensors", "bare.pth"])
@pytest.mark.parametrize("method", ["doconv", "plain"])
def test_starts_as_the_checkpoint_ended(tiny, finished, tmp_path, name, method):
    folder, result = finished
    path = folder / name
    if name == "bare.pth":
        path = tmp_path / name
        torch.save(load_file(folder / "folded.safetensors"), path)
    data = create_data("digits")
    network, description = build(tiny(method=method, **settings(path)), data)
    assert evaluate(network, data)["accuracy"] == result.accuracy_folded > 0.2
    assert bool(description["layers"]) == (method == "doconv")


def test_another_number_of_classes_gets_a_new_classifier(finished, silent):
    folder, _ = finished
    trained = load_file(folder / "folded.safetensors")
    network = zoo.create("digits_resnet", width=4, num_classes=3)
    head = network.head.weight.detach().clone()
    assert start_from(network, trained, "folded.safetensors", 3, silent) == ["head.weight", "head.bias"]
    assert torch.equal(network.head.weight, head)
    assert torch.equal(network.stem[0].weight, trained["stem.0.weight"])
    lines = silent.file.getvalue().splitlines()
    assert lines == ["pretrained weights are for 10 classes, the data has 3: new head.weight, head.bias"]


def test_a_file_without_a_classifier_gets_a_new_one(finished, silent):
    trained = {n: v for n, v in load_file(finished[0] / "folded.safetensors").items() if not n.startswith("head.")}
    network = zoo.create("digits_resnet", width=4)
    assert start_from(network, trained, "folded.safetensors", 10, silent) == ["head.weight", "head.bias"]
    assert torch.equal(network.stem[0].weight, trained["stem.0.weight"])
    assert silent.file.getvalue() == "pretrained weights have no classifier: new head.weight, head.bias\n"
    del trained["stem.0.weight"]
    with pytest.raises(CheckpointError, match=r"3 missing: head\.bias, head\.weight, stem\.0\.weight; nothing"):
        start_from(network, trained, "folded.safetensors", 10, silent)


def test_another_network_is_refused(tiny, finished):
    config = tiny(**settings(finished[0] / "folded.safetensors", architecture_args={"width": 8}))
    with pytest.raises(CheckpointError, match=r"folded\.safetensors: does not fit"):
        build(config, create_data("digits"))


def test_missing_file(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file"):
        build(tiny(**settings(tmp_path / "nowhere.pth")), create_data("digits"))


def test_the_librarys_own_weights(tiny, monkeypatch):
    """Their download is replaced by numbers that a fresh network cannot have."""
    asked, original = [], zoo.create

    def create(name, **options):
        pretrained = options.pop("pretrained", False)
        network = original(name, **options)
        if pretrained:
            asked.append(name)
            for parameter in network.parameters():
                torch.nn.init.constant_(parameter, 0.125)
        return network

    monkeypatch.setattr(zoo, "create", create)
    network, _ = build(tiny(pretrained=True, init="preserve"), create_data("digits"))
    assert asked == ["digits_resnet"]
    assert torch.allclose(foldconv.fold(network).stem[0].weight, torch.tensor(0.125))
