import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foldconv
from foldconv.errors import UnsupportedError


def network():
    """A norm that is absorbed, a sum, a permuted, a grouped transposed and a linear layer; one that is never called."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.up = nn.ConvTranspose2d(8, 4, 2, groups=2)
            self.mixed = foldconv.PermutedConv2d(4, 4, 1, groups=2, output_order=[2, 0, 3, 1])
            self.head, self.idle = nn.Linear(4, 5), nn.Linear(2, 2)

        def forward(self, x):
            up = self.up(F.relu(self.norm(self.conv(x))))
            return self.head((self.mixed(up).sigmoid() + up.relu()).mean((2, 3)))

    net = Net()
    with torch.no_grad():
        net.norm.running_var.uniform_(0.5, 2)
        net.norm.weight.uniform_(0.5, 2)
        net.norm.running_mean.uniform_(-1, 1)
    return net.eval()


def channels(values, dim):
    flat = values.movedim(dim, 0).flatten(1)
    return flat.amin(1), flat.amax(1)


@torch.no_grad()
def test_ranges_are_those_of_the_folded_network():
    net = network()
    images = torch.randn(9, 3, 7, 7)
    rich = foldconv.expand(net, "repvgg")
    before = {name: value.clone() for name, value in rich.state_dict().items()}
    rich.train()
    report = foldconv.range_report(rich, [(images[:4], torch.arange(4)), images[4:]])
    assert rich.training
    assert all(torch.equal(value, rich.state_dict()[name]) for name, value in before.items())
    assert report.samples == 9
    layers = {layer.name: layer for layer in report.layers}
    assert list(layers) == ["conv", "up", "mixed", "head", "idle"]

    scale = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    up = net.up(net.norm(net.conv(images)).relu())
    mixed = net.mixed(up)
    conv, norm = net.conv.weight * scale[:, None, None, None], net.norm(net.conv(images))
    grouped = net.up.weight.view(2, 4, 2, 2, 2).transpose(1, 2).flatten(0, 1)
    head = net.head((mixed.sigmoid() + up.relu()).mean((2, 3)))
    expected = {
        "conv": (channels(conv, 0), channels(norm.relu(), 1)),
        "up": (channels(grouped, 0), channels(up, 1)),  # two read it, so more is stored than what the ReLU leaves
        "mixed": (channels(net.mixed.weight[net.mixed.output_order], 0), channels(mixed, 1)),
        "head": (channels(net.head.weight, 0), channels(head, 1)),
    }
    for name, (weights, activations) in expected.items():
        for ranges, (low, high) in ((layers[name].weights, weights), (layers[name].activations, activations)):
            torch.testing.assert_close(torch.tensor(ranges.low), low, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(torch.tensor(ranges.high), high, atol=1e-4, rtol=1e-4)
    assert layers["idle"].activations is None
    assert "was not called" in layers["idle"].hurts
    assert json.loads(json.dumps(report.to_json()))["layers"][1]["activations"]["low"] == list(
        layers["up"].activations.low
    )


def test_a_heavy_channel_and_an_outlier_are_named():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.Hardtanh(-1, 0.01))
    with torch.no_grad():
        net[0].weight[5] *= 100
        net[0].bias[5] *= 100
        net[2].weight[:, 5] /= 100
        net[2].weight[1] = 0
    images = torch.randn(16, 4, 9, 9)
    report = foldconv.range_report(net, images)
    first, second = report.layers
    assert first.weights.heaviest == first.activations.heaviest == 5
    assert min(first.weights.ratio, first.activations.ratio) > 50
    assert [text.partition(" are ")[0] for text in first.hurts] == ["channel 5's weights", "channel 5's activations"]
    assert second.hurts == ()
    assert second.weights.ratios[1] == 0
    assert max(second.activations.high) <= 0.01 + 1e-6
    assert "channel 5's weights are" in str(report)
    even = foldconv.range_report(foldconv.equalize(net), images)
    assert "nothing here will hurt int8" in str(even)
    images[0, :, 4, 4] = 1e3
    (outlier,) = foldconv.range_report(nn.Conv2d(4, 2, 1), images).layers
    assert outlier.outlier > 100
    assert "times what 99.9 % stay below" in outlier.hurts[0]


def test_by_keyword_in_half_precision_and_as_pairs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 2)

        def forward(self, x, factor):
            return self.conv(x * factor)

    net, x, factor = Two().half(), torch.randn(4, 2, 5), torch.rand(4, 1, 1)
    by_keyword = foldconv.range_report(net, {"x": x, "factor": factor})
    assert by_keyword == foldconv.range_report(net, [(x, factor)])
    assert by_keyword != foldconv.range_report(net, [(x, factor + 1)])


@pytest.mark.parametrize(
    ("model", "calibration", "message"),
    [
        (nn.Conv2d(3, 2, 1), [], "calibration: .*received none"),
        (nn.Conv2d(3, 2, 1), torch.zeros(0, 3, 4, 4), "calibration: .*at least one sample"),
        (nn.Conv2d(3, 2, 1), torch.full((2, 3, 4, 4), torch.nan), "calibration: .*NaN or infinity"),
        (nn.Conv2d(3, 2, 1), torch.zeros(2, 3, 4, 4, device="meta"), "calibration: .*meta device"),
        (nn.Conv2d(3, 2, 1), torch.zeros(2, 4, 4, 4), "calibration: .*expected input"),
        (nn.Conv2d(3, 2, 1), [torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 4)], "calibration: "),
        (nn.Conv2d(3, 2, 1), "digits", "calibration: .*received 'digits'"),
        (nn.Conv2d(3, 2, 1), [torch.zeros(2, 3, 4, 4), "digits"], "calibration: .*received 'digits'"),
        (nn.Conv2d(3, 2, 1), 3, "calibration: .*received 3"),
        ("resnet18", torch.zeros(2, 3, 4, 4), "model: expected a torch.nn.Module, received str"),
        (nn.ReLU(), torch.zeros(2, 3, 4, 4), "ReLU has no convolution"),
        (nn.Conv2d(3, 2, 1, device="meta"), torch.zeros(2, 3, 4, 4), "weight: is on the meta device"),
        (nn.Sequential(nn.Conv2d(3, 2, 1)), torch.full((2, 3, 4, 4), 1e38), "0: its output .* holds NaN or infinity"),
    ],
)
def test_refused_in_one_line(model, calibration, message):
    if isinstance(model, nn.Sequential):
        nn.init.constant_(model[0].weight, 1e3)
    with pytest.raises((TypeError, UnsupportedError), match=message) as caught:
        foldconv.range_report(model, calibration)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_named():
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 1))
    nn.init.constant_(net[1].weight, torch.inf)
    with pytest.raises(UnsupportedError, match="1: its weights hold NaN or infinity"):
        foldconv.range_report(net, torch.randn(2, 3, 4, 4))
