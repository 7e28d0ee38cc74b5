import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import foldconv
from foldconv.deploy.calibration import samples_of
from foldconv.deploy.sensitivity import sensitivities
from foldconv.errors import NoMatchError, UnsupportedError

X = torch.randn(8, 3, 8, 8)
LABELS = torch.arange(8) % 4


class Kinds(nn.Module):
    """A residual sum around convolutions of all kinds that runtimes differ in."""

    def __init__(self, deep):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2)
        self.up_grouped = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.deep = nn.Conv3d(8, 8, 3, padding=1) if deep else None
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.depthwise(self.grouped(x).relu()) + x).relu()
        x = self.circular(self.up_grouped(self.up(x).relu()).relu()).relu()
        if self.deep is not None:
            x = self.deep(x.unsqueeze(2)).squeeze(2).relu()
        return self.head(x.mean((2, 3)))


def kinds(deep):
    torch.manual_seed(0)
    net = foldconv.expand(Kinds(deep), "repvgg", include="stem", example_inputs=X)
    net.train()(X)
    return net.train()


# What each runtime leaves in float without a word. OpenVINO's depends on the processor for transposed ones.
LEFT = {
    ".onnx": {"up", "up_grouped"},
    ".xml": {"circular"},
    ".pte": {"up_grouped"},
    ".tflite": {"deep"},
}
NEEDED = {".onnx": "onnxruntime", ".xml": "nncf", ".pte": "executorch"}


@pytest.mark.parametrize("form", LEFT)
def test_a_network_is_written_in_int8_and_what_stays_in_float_is_told(tmp_path, form):
    pytest.importorskip("brevitas")
    if form == ".tflite":
        if not os.environ.get("FOLDCONV_LITERT_PYTHON") and not find_spec("litert_torch"):
            pytest.skip("FOLDCONV_LITERT_PYTHON names no environment with LiteRT's converter")
    else:
        pytest.importorskip(NEEDED[form])
    net, path = kinds(deep=form != ".pte"), tmp_path / f"net{form}"
    found = foldconv.quantize(net, path, (X, LABELS), keep_float="head", labels=list("abcd"))
    left = set(found.float_layers)
    if form == ".xml":
        left -= {"up", "up_grouped"}
    assert left == LEFT[form] | {"head"}
    assert found.kept == ("head",)
    assert 0 < found.error < 0.1
    assert found.accuracy_before is not None
    assert net.training
    assert "(asked)" in str(found)
    if form != ".onnx":  # each runtime takes seconds to start
        return
    # What was written is what was judged.
    run, description = foldconv.deploy.export.runner(path)
    received = np.concatenate(run([x[None].numpy() for x in X]))
    expected = net.eval()(X).detach().numpy()
    assert np.linalg.norm(received - expected) / np.linalg.norm(expected) == pytest.approx(found.error, rel=0.05)
    assert (received.argmax(1) == LABELS.numpy()).mean() == found.accuracy
    assert description["int8"]["float_layers"] == list(found.float_layers)
    assert description["labels"] == list("abcd")
    with pytest.raises(FileExistsError):
        foldconv.quantize(net, path, X)


def test_a_network_in_half_precision_is_calibrated_in_its_own_width(tmp_path):
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).half()
    found = foldconv.quantize(net, tmp_path / "net.onnx", X, equalize=False, dynamic_batch=False)
    assert found.error < 0.1
    assert next(net.parameters()).dtype == torch.float16


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.second(self.second(self.first(x).relu()).relu())


def test_a_layer_that_is_called_twice_is_quantized(tmp_path):
    """With one weight for both calls, ONNX Runtime does not load the file when it is told to add exactly."""
    pytest.importorskip("onnxruntime")
    found = foldconv.quantize(Twice(), tmp_path / "net.onnx", X, equalize=False, per_channel=False)
    assert found.float_layers == ()


def test_the_most_sensitive_layers_are_found():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        net[2].weight[0] *= 300
        net[2].bias[0] *= 300
        net[4].weight[:, 0] /= 300
    before = [value.clone() for value in net.parameters()]
    per_tensor = sensitivities(net, (X,), per_channel=False)
    assert set(list(per_tensor)[:2]) == {"2", "4"}
    assert per_tensor["2"] > 10 * sensitivities(net, (X,))["2"]
    assert all(map(torch.equal, before, net.parameters()))


def test_samples_are_read_from_whatever_holds_them():
    labelled = [(X[:4], LABELS[:4]), (X[4:], LABELS[4:])]
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=3)
    for given in (X, [X[:4], X[4:]], iter([X]), {"x": X}, DataLoader(TensorDataset(X), batch_size=3)):
        samples = samples_of(given)
        assert samples.labels is None
        assert torch.equal(next(iter(samples.inputs.values())), X)
    for given in ((X, LABELS), labelled, loader, [({"x": X}, LABELS)]):
        samples = samples_of(given)
        assert torch.equal(samples.labels, LABELS)
        assert torch.equal(next(iter(samples.inputs.values())), X)
    two = samples_of((X, X + 1))
    assert torch.equal(two.inputs[1], X + 1)
    assert [len(batch[0]) for batch in two.batches(3)] == [3, 3, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (X[:0], r"expected tensors of at least one sample, received \(0, 3, 8, 8\)"),
        ([], "expected at least one batch, received none"),
        ([X, X[:, :2]], r"batch 2: expected samples of \(3, 8, 8\) .*, as in batch 1, received \(2, 8, 8\)"),
        ([X, X * float("nan")], "batch 2: holds NaN or infinity"),
        (
            [(X, LABELS[:3])],
            r"batch 1: expected 8 labels, one whole number a sample, received torch.int64 of shape \(3",
        ),
        ([({"x": X}, X)], "batch 1: expected 8 labels, one whole number a sample, received torch.float32"),
        ([(X, X[:3])], r"batch 1: expected as many samples in each tensor, received \[8, 3\]"),
        ([X, (X, LABELS)], "batch 2: expected labels in all batches or in none"),
        (TensorDataset(X), "expected a tensor, .* received a TensorDataset; wrap it in a DataLoader"),
        ([(X, "cat")], "batch 1: expected a tensor"),
        (3, "expected a tensor, .* received 3"),
    ],
    ids=["empty", "none", "size", "NaN", "count", "no numbers", "unequal", "some", "dataset", "text", "number"],
)
def test_samples_that_are_refused(given, message):
    with pytest.raises((UnsupportedError, TypeError), match=f"calibration: {message}") as error:
        samples_of(given)
    assert "\n" not in str(error.value)


def test_what_cannot_be_quantized_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2)).eval()
    net(X)
    with pytest.raises(UnsupportedError, match=r".pt2: torch.export is not written in int8; expected one of: .onnx"):
        foldconv.quantize(net, tmp_path / "net.pt2", X)
    monkeypatch.setattr("foldconv.deploy.formats.Format.expect_int8", lambda self: None)
    path = tmp_path / "net.onnx"
    for options, error, message in (
        ({"keep_float": "convs"}, NoMatchError, "the pattern 'convs' matches no"),
        ({"auto_keep": -1}, UnsupportedError, "auto_keep: expected how many layers stay in float, received -1"),
        ({"auto_keep": 3}, UnsupportedError, "0 and 3 of 3 layers would stay in float"),
        ({"keep_float": ["0", "2", "4"]}, UnsupportedError, "3 and 0 of 3 layers would stay in float"),
        ({"equalize": "no"}, TypeError, "equalize: expected True or False"),
    ):
        with pytest.raises(error, match=message):
            foldconv.quantize(net, path, X, **options)
    with pytest.raises(UnsupportedError, match="calibration: ") as refused:
        foldconv.quantize(net, path, X[..., :6])
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []


def test_a_heavy_channel_is_mended_by_equalizing_and_needs_no_scale_of_its_own(tmp_path):
    """One channel 100 times the rest, undone by the next layer: the function is that of the even network."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("brevitas")
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    for layer in (net[0], net[2], net[6]):
        nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        net[0].weight[3] *= 100
        net[0].bias[3] *= 100
        net[2].weight[:, 3] /= 100
    torch.manual_seed(9)
    x = torch.randn(32, 3, 16, 16)
    errors = [
        foldconv.quantize(net, tmp_path / f"{i}.onnx", x, equalize=even, per_channel=False).error
        for i, even in enumerate((False, True))
    ]
    assert errors[0] > 0.117
    assert errors[1] < 0.01
