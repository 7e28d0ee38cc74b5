"""`save` and `load`: the training state survives, damaged files say so, the previous file is never lost."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import foldconv
from foldconv import CheckpointError
from foldconv.files.native import read_description
from foldconv.testing import randomize


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))


@pytest.fixture
def rich():
    torch.manual_seed(0)
    net = foldconv.expand(plain(), "doconv", include="0")
    net = foldconv.expand(net, foldconv.DOConv(depth_multiplier=12))
    randomize(net)
    return net


def assert_same_state(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_round_trip_rebuilds_the_expanded_network(rich, tmp_path):
    foldconv.save(rich, tmp_path / "net.safetensors", extra={"epoch": 3})
    base = plain()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    loaded = foldconv.load(tmp_path / "net.safetensors", base)
    assert_same_state(loaded, rich)
    assert [type(loaded[i]).__name__ for i in (0, 3)] == ["DOConv2d", "DOConv2d"]
    assert loaded[3].depth_multiplier == 12
    assert read_description(tmp_path / "net.safetensors")["extra"] == {"epoch": 3}
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in before.items())
    assert type(base[0]) is nn.Conv2d


def test_training_goes_on_where_it_stopped(rich, tmp_path):
    foldconv.save(rich, tmp_path / "net.safetensors")
    loaded = foldconv.load(tmp_path / "net.safetensors", plain())
    x = torch.randn(4, 3, 8, 8)
    for net in (rich, loaded):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            net.train()(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(loaded, rich)


def test_plain_and_folded_networks_round_trip(rich, tmp_path):
    for net, base in (
        (foldconv.fold(rich), plain()),
        (foldconv.fold(rich, batchnorm=True), foldconv.fold(plain(), batchnorm=True)),
    ):
        foldconv.save(net, tmp_path / "net.safetensors")
        assert_same_state(foldconv.load(tmp_path / "net.safetensors", base), net)
        assert read_description(tmp_path / "net.safetensors")["layers"] == {}
    # The folded file is an ordinary one: anybody's loader reads it into the original class.
    foldconv.save(foldconv.fold(rich), tmp_path / "net.safetensors")
    plain().load_state_dict(load_file(tmp_path / "net.safetensors"))


def test_dtype_layout_and_tied_weights(tmp_path):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    twin = nn.Conv2d(4, 4, 3, padding=1)
    twin.weight = conv.weight
    base = nn.Sequential(conv, nn.ReLU(), twin, conv).to(torch.bfloat16, memory_format=torch.channels_last)
    rich = foldconv.expand(base, "doconv")
    randomize(rich)
    foldconv.save(rich, tmp_path / "net.safetensors")
    loaded = foldconv.load(tmp_path / "net.safetensors", base)
    assert_same_state(loaded, rich)
    assert loaded[0] is loaded[3]
    assert loaded[0].weight is loaded[2].weight
    assert loaded[0].D is loaded[2].D
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    stored = load_file(tmp_path / "net.safetensors")
    assert len([key for key in stored if key.endswith("D")]) == 1


def other(kind):
    return {
        "another network": nn.Sequential(
            nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3)
        ),
        "a layer is gone": nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
        "no convolution there": nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)
        ),
        "another kernel size": nn.Sequential(
            nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)
        ),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another network", r"does not fit Sequential; 8 misshapen: 0.weight \(expected \(5, 3, 3, 3\), received \(4,"),
        ("a layer is gone", "expects a convolution named '3', which Sequential does not have; pass the plain network"),
        (
            "no convolution there",
            "expects a convolution named '0', which Sequential has as Linear; pass the plain network",
        ),
        ("another kernel size", "0: depth_multiplier: expected an integer ≥ 25"),
    ],
)
def test_a_network_that_does_not_fit(rich, tmp_path, kind, message):
    foldconv.save(rich, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=message):
        foldconv.load(tmp_path / "net.safetensors", other(kind))


def with_header(path, change):
    tensors = load_file(path)
    description = read_description(path)
    save_file(tensors, path, metadata=change(description))


def with_layer(layer):
    return lambda description: {"foldconv": json.dumps({**description, "layers": {"0": layer}})}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "no such file; expected a checkpoint"),
        (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "not a readable safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "not a readable safetensors file"),
        (lambda p: torch.save({"a": torch.zeros(1)}, p), "not a readable safetensors file"),
        (lambda p: save_file({"a": torch.zeros(1)}, p), "found safetensors without its header"),
        (lambda p: with_header(p, lambda d: {"foldconv": "{"}), "header is damaged or of a newer format than 1"),
        (lambda p: with_header(p, lambda d: {"foldconv": json.dumps({**d, "format": 2})}), "of a newer format than 1"),
        (
            lambda p: with_header(p, with_layer({"method": "docnv"})),
            "unknown method 'docnv'; did you mean 'doconv'",
        ),
        (
            lambda p: with_header(p, with_layer({"method": "doconv", "depth_multiplyer": 1})),
            "method 'doconv': unknown option 'depth_multiplyer'; did you mean 'depth_multiplier'",
        ),
    ],
)
def test_damaged_files(rich, tmp_path, damage, message):
    path = tmp_path / "net.safetensors"
    foldconv.save(rich, path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        foldconv.load(path, plain())


@pytest.mark.parametrize("blow", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_previous_file_survives_a_failed_write(rich, tmp_path, monkeypatch, blow):
    path = tmp_path / "net.safetensors"
    foldconv.save(rich, path)
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        with open(target, "wb") as file:
            file.write(b"half")
        raise blow

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(type(blow)):
        foldconv.save(plain(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
