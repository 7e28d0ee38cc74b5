"""Hugging Face's models, trainer and hub, with the real packages and no network: ``nox -s hosts``."""

import base64
import json

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import foldconv  # noqa: E402
from foldconv import hub  # noqa: E402
from foldconv.network.tree import foldable_layers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
SIZES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 2}


def resnet():
    config = transformers.ResNetConfig(**SIZES, embedding_size=8, layer_type="basic")
    return transformers.ResNetForImageClassification(config).eval()


def regnet():
    config = transformers.RegNetConfig(**SIZES, embedding_size=8, groups_width=8)
    return transformers.RegNetForImageClassification(config).eval()


def convnext():
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**SIZES, num_stages=2)).eval()


def trained(model):
    """As after some training: no parameter is what it was."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


X = torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(("build", "method"), [(resnet, "acnet"), (regnet, "orepa"), (convnext, "doconv")])
def test_save_pretrained_keeps_the_training_state_and_a_fold_is_ordinary(build, method, tmp_path):
    plain = build()
    rich = trained(hub.expand(plain, method, example_inputs=X))
    rich.save_pretrained(tmp_path / "rich")  # transformers' own
    assert not hasattr(plain.config, hub.KEY)
    for cls in (type(plain), transformers.AutoModelForImageClassification):
        again = hub.from_pretrained(tmp_path / "rich", cls)
        assert foldable_layers(again).keys() == foldable_layers(rich).keys() != set()
        assert all(torch.equal(value, rich.state_dict()[name]) for name, value in again.state_dict().items())
        assert not again.training
    hub.save_fold(rich, tmp_path / "fold")
    folded = type(plain).from_pretrained(tmp_path / "fold")
    assert hub.KEY not in json.loads((tmp_path / "fold/config.json").read_text())
    assert folded.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        right, found = rich(X).logits, folded(X).logits
    assert (right - found).abs().max() < 1e-6 * right.abs().max()


def test_a_config_that_is_behind_the_model(tmp_path):
    rich = trained(hub.expand(resnet(), "doconv"))
    foldconv.fold(rich).save_pretrained(tmp_path / "fold")  # the config still tells of layers
    folded = hub.from_pretrained(tmp_path / "fold", type(rich))
    assert torch.allclose(folded(X).logits, rich(X).logits, atol=1e-5)
    assert not hasattr(folded.config, hub.KEY)
    unsaid = trained(foldconv.expand(resnet(), "doconv"))  # the config tells of none
    hub.save_pretrained(unsaid, tmp_path / "rich")
    assert torch.equal(hub.from_pretrained(tmp_path / "rich", type(rich))(X).logits, unsaid(X).logits)


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    rich = hub.expand(resnet(), "doconv")
    rich.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layers, message in (
        ({"nowhere": {"method": "doconv"}}, "expects a convolution named 'nowhere'"),
        ({}, "does not fit ResNetForImageClassification; 5 surplus"),
        (["conv"], "expected names with options"),
        (1, "expected names with options, received 1"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {hub.KEY: layers}))
        with pytest.raises(foldconv.CheckpointError, match=message):
            hub.from_pretrained(tmp_path, type(rich))


def test_other_networks_are_refused():
    for call in (lambda net: hub.expand(net, "doconv"), hub.fold, lambda net: hub.save_pretrained(net, "x")):
        with pytest.raises(foldconv.UnsupportedError, match="expected a model of transformers, received Sequential"):
            call(nn.Sequential(nn.Conv2d(3, 4, 3)))


@pytest.fixture
def uploads():
    """What is sent to the hub, by path; the HTTP client is the only thing that is not real."""
    httpx = pytest.importorskip("httpx2")
    import huggingface_hub

    sent = {}

    def answer(request):
        path, body = request.url.path, request.read()
        if path == "/api/repos/create":
            sent["repository"] = json.loads(body)
            return httpx.Response(200, json={"url": "https://huggingface.co/me/stripes"})
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return httpx.Response(200, json={"files": files})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = "https://huggingface.co/me/stripes/commit/abc"
            return httpx.Response(200, json={"commitUrl": url, "commitOid": "abc", "success": True})
        return httpx.Response(200, json={})

    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))
    yield sent
    from huggingface_hub.utils import _http

    huggingface_hub.set_client_factory(_http.default_client_factory)


def test_push_to_hub_sends_the_fold_and_a_card(uploads, tmp_path):
    from huggingface_hub import ModelCard

    rich = trained(hub.expand(resnet(), "doconv"))
    address = hub.push_to_hub(rich, "me/stripes", token="hf_x", text="Stripes, 99 %.", license="mit", tags=["vision"])
    assert address == "https://huggingface.co/me/stripes/commit/abc"
    assert uploads.pop("repository")["name"] == "stripes"
    assert uploads.keys() == {"README.md", "config.json", "model.safetensors"}
    for name, content in uploads.items():
        (tmp_path / name).write_bytes(content)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert card.data.tags == ["vision", "foldconv"]
    count = [f"{sum(p.numel() for p in m.parameters()):,}" for m in (rich, resnet())]
    assert f"| parameters | {count[0]} | {count[1]} |" in card.text
    assert "5 of its convolutions" in card.text
    assert card.text.endswith("Stripes, 99 %.")
    folded = type(rich).from_pretrained(tmp_path)
    assert torch.allclose(folded(X).logits, rich(X).logits, atol=1e-5)


def test_accelerate_trains_saves_and_resumes(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    labels = torch.tensor([0, 1])

    def prepared(accelerator):
        torch.manual_seed(0)
        rich = hub.expand(resnet(), "doconv").train()
        optimizer = torch.optim.AdamW(foldconv.parameter_groups(rich, 1e-2), lr=1e-3)
        return accelerator.prepare(rich, optimizer)

    def step(accelerator, model, optimizer):
        accelerator.backward(model(X, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()

    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = prepared(accelerator)
    step(accelerator, model, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    step(accelerator, model, optimizer)

    other = accelerate.Accelerator(cpu=True)
    resumed, optimizer = prepared(other)
    other.load_state(str(tmp_path / "state"))
    step(other, resumed, optimizer)
    assert all(torch.equal(v, resumed.state_dict()[name]) for name, v in model.state_dict().items())
    rich = other.unwrap_model(resumed).eval()
    hub.save_fold(rich, tmp_path / "fold")
    folded = type(rich).from_pretrained(tmp_path / "fold")
    assert (folded(X).logits - rich(X).logits).abs().max() < 1e-6 * rich(X).logits.abs().max()


def test_the_example(import_example, tmp_path):
    """Trainer: train, save, take the model from the checkpoint, resume, evaluate, fold, transformers' own loader."""
    done = import_example("train_huggingface").main(tmp_path)
    assert done["error"] < 1e-6
    assert done["epochs"] == 4
    assert done["accuracy"] == done["accuracy of the fold"] > 0.6
