"""`save` and `load`: the training state survives, damaged files say so, the previous file is never lost."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import foldconv
from foldconv import CheckpointError, UnsupportedError
from foldconv.files._described import no_larger_than
from foldconv.files.native import describe_layers, expand_as_described, read_description
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


def header(**parts):
    return lambda p: with_header(p, lambda d: {"foldconv": json.dumps({**d, **parts})})


LEVELS = '{"format": 1, "layers": ' + "[" * 100_000 + "]" * 100_000 + "}"
ODD_HEADERS = {
    "thousands of levels": (
        lambda p: with_header(p, lambda d: {"foldconv": LEVELS}),
        "header is damaged or of a newer",
    ),
    "a list of layers": (header(layers=[1]), "header is damaged or of a newer format than 1"),
    "a layer that is text": (
        header(layers={"0": "doconv"}),
        "layers: '0': expected a name with options, received 'doc",
    ),
    "an option that is a list of lists": (
        header(layers={"0": {"method": "doconv", "depth_multiplier": [[1]]}}),
        r"layers: '0': 'depth_multiplier': expected a plain value, received \[\[1\]\]",
    ),
    "an option of another type": (header(layers={"0": {"method": "doconv", "depth_multiplier": "9"}}), "0: "),
    "a negative option": (header(layers={"0": {"method": "doconv", "depth_multiplier": -9}}), "0: depth_multiplier: "),
    "a huge option": (
        header(layers={"0": {"method": "doconv", "depth_multiplier": 10**9}}),
        "layers: '0': 'depth_multiplier': 1000000000 is beyond the 1,[0-9]* values that the file holds",
    ),
    "a list of five for one": (header(layers={"0": {"method": "dilated", "kernel_sizes": 5}}), "0: .*"),
    "shared names that are numbers": (header(shared={"a": 1}), "header: shared: expected dict of str, received 1"),
    "groups that are text": (header(groups={"3": "2"}), "header: groups: expected dict of int, received '2'"),
    "an order that is a number": (header(order=3), "header: order: expected list of str, received 3"),
    "extra that is a list": (header(extra=[1]), r"header: extra: expected dict of object, received \[1\]"),
    "a megabyte of a name": (header(layers={"x" * 10**6: {"method": "doconv"}}), "expects a convolution named 'xx"),
    "a megabyte of a method": (header(layers={"0": {"method": "x" * 10**6}}), "0: unknown method 'xx"),
    "many aliases": (header(shared={f"{i:01000}": "3.bias" for i in range(1000)}), "1000 surplus: 00"),
}


@pytest.mark.parametrize("what", ODD_HEADERS)
def test_odd_headers(rich, tmp_path, what):
    path = tmp_path / "net.safetensors"
    foldconv.save(rich, path)
    change, message = ODD_HEADERS[what]
    change(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        foldconv.load(path, plain())
    assert len(str(caught.value)) <= 2000


def test_values_of_another_kind(rich, tmp_path):
    path = tmp_path / "net.safetensors"
    foldconv.save(rich, path)
    whole = load_file(path)
    for name, value, message in (
        ("3.weight", whole["3.weight"].long(), r"3\.weight: expected floating point values, received integer ones"),
        ("3.weight", whole["3.weight"] > 0, r"3\.weight: expected floating point values, received boolean ones"),
        ("3.weight", whole["3.weight"] + 0j, r"3\.weight: expected floating point values, received complex ones"),
        ("3.bias", torch.full((4,), 1e300, dtype=torch.float64), r"3\.bias: 4 of its values are beyond torch\.float32"),
        (
            "1.num_batches_tracked",
            torch.tensor(2.5),
            r"1\.num_batches_tracked: 1 of its values are beyond torch\.int",
        ),
        ("1.running_mean", torch.zeros(4, dtype=torch.int8), "expected floating point values, received integer ones"),
    ):
        save_file({**whole, name: value}, path, {"foldconv": json.dumps(description_of(rich))})
        with pytest.raises(CheckpointError, match=message):
            foldconv.load(path, plain())
    changed = {**whole, "3.weight": whole["3.weight"].double(), "1.num_batches_tracked": torch.tensor(2.0)}
    save_file(changed, path, {"foldconv": json.dumps(description_of(rich))})
    assert foldconv.load(path, plain())[1].num_batches_tracked == 2


def description_of(model):
    return {"format": 1, "layers": describe_layers(model)}


def test_a_network_that_is_far_larger_than_its_file_is_not_built():
    def grow():
        return nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(10**6)))

    with pytest.raises(CheckpointError, match=r"x: describes a network far larger than the 1 values that it holds"):
        with no_larger_than({"a": torch.ones(1)}, "x"):
            grow()
    with pytest.raises(CheckpointError, match=r"x: describes a network that cannot be built \("):
        with no_larger_than({"a": torch.ones(1)}, "x"):
            nn.Conv2d(10**9, 10**9, 9)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a": {1, 2}}, r"extra\['a'\]: expected what JSON can hold, received set: \{1, 2\}; convert it first"),
        ({"a": [0, {"b": torch.ones(1)}]}, r"extra\['a'\]\[1\]\['b'\]: expected what JSON can hold, received Tensor"),
        ({"a": np.float32(1)}, r"extra\['a'\]: expected what JSON can hold, received float32"),
        ({"a": float("nan")}, r"extra\['a'\]: expected what JSON can hold, received nan; give None or text"),
        ({"a": {1: 2}}, r"extra\['a'\]: expected names that are text, as JSON has, received 1"),
        ({"a": b"bytes"}, r"extra\['a'\]: expected what JSON can hold, received bytes"),
        ({"a": 10**5000}, r"extra\['a'\]: expected a number that JSON readers take, received over 1000 bits"),
        ({"a": "\ud800"}, r"extra\['a'\]: expected text, received .*, which no file can hold"),
        ([1], r"extra: expected a dictionary, received \[1\]"),
    ],
)
def test_extra_that_json_cannot_hold(tmp_path, extra, message):
    with pytest.raises(UnsupportedError, match=message):
        foldconv.save(plain(), tmp_path / "net.safetensors", extra=extra)
    assert not list(tmp_path.iterdir())


def test_extra_that_holds_itself(tmp_path):
    extra = {}
    extra["a"] = extra
    with pytest.raises(UnsupportedError, match="expected what JSON can hold, received over 100 levels"):
        foldconv.save(plain(), tmp_path / "net.safetensors", extra=extra)


def test_what_no_file_can_hold(tmp_path):
    for net, message in (
        (
            nn.Conv2d(1, 1, 3, device="meta"),
            "weight: expected plain values, received a meta tensor; it has",
        ),
        (
            nn.Conv2d(1, 1, 3, dtype=torch.complex128),
            "weight: .* holds tensors of real numbers, received torch.comp",
        ),
    ):
        with pytest.raises(UnsupportedError, match=message):
            foldconv.save(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


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


class OnlyARunShows(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.aside = nn.Sequential(nn.BatchNorm2d(channels))

    def forward(self, x):
        return self.norm(self.conv(x)) if float(x.detach().sum()) < 1e9 else x


def test_norms_are_recorded_not_proven_again(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    rich = foldconv.expand(OnlyARunShows(), "repvgg", example_inputs=x)
    rich(x)
    foldconv.save(rich, tmp_path / "rich")
    assert read_description(tmp_path / "rich")["layers"]["conv"]["norm"] == "norm"
    again = foldconv.load(tmp_path / "rich", OnlyARunShows())
    torch.testing.assert_close(again.eval()(x), rich.eval()(x), rtol=0, atol=0)
    described = describe_layers(rich)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    for model, name, norm, said in (
        (OnlyARunShows(), "conv", "gone", "took in the norm 'gone' of 4 channels, which OnlyARunShows does not have"),
        (OnlyARunShows(), "conv", "conv", "took in the norm 'conv' of 4 channels, which OnlyARunShows does not have"),
        (OnlyARunShows(5), "conv", "aside.0", "took in the norm 'aside.0' of 4 channels, which OnlyARunShows does not"),
        (OnlyARunShows(), "conv", ["norm"], r"took in the norm \['norm'\] of 4 channels, which OnlyARunShows does not"),
        (network, "0", "2", "took in the norm '2', but in Sequential '1' follows it"),
    ):
        with pytest.raises(CheckpointError, match=f"^file: {name}: {said}"):
            expand_as_described(model, {name: described["conv"] | {"norm": norm}}, "file")
    # An older file says nothing of norms, and one that says that there was none is believed.
    without = {key: value for key, value in described["conv"].items() if key != "norm"}
    assert expand_as_described(network, {"0": without})[0].norm is not None
    assert expand_as_described(network, {"0": without | {"norm": None}})[0].norm is None
