"""docs/runtimes.md, run again: each runtime that is installed computes every kind of convolution that it takes."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foldconv
from foldconv.deploy.apart import VARIABLE
from foldconv.deploy.export import runner
from foldconv.deploy.formats import FORMATS
from foldconv.deploy.running import run_file
from foldconv.errors import FoldMismatchError, UnsupportedError

PAGE = Path(__file__).parents[2] / "docs" / "runtimes.py"
# Converters warn of their own parts.
pytestmark = pytest.mark.filterwarnings("default")
each_format = pytest.mark.parametrize("suffix", FORMATS)


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("runtimes", PAGE)
    sys.modules["runtimes"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["runtimes"]


def need(suffix):
    """The format; skips where its packages are absent, unless the session says that they are there."""
    form = FORMATS[suffix]
    if suffix not in os.environ.get("FOLDCONV_RUNTIMES", "").split():
        packages = [form.apart] if form.apart and not shutil.which(os.environ.get(VARIABLE, "")) else form.packages
        for package in packages:
            if importlib.util.find_spec(package.replace("-", "_")) is None:
                pytest.skip(f"{suffix} needs {package}")
    return form


@each_format
def test_every_kind_of_convolution_that_a_runtime_takes_is_right(suffix, page, tmp_path):
    form = need(suffix)
    convs = {name: conv for name, conv in page.kinds().items() if not page.refusal(conv, form)}
    network, path = page.Beside(list(convs.values())), tmp_path / f"net{suffix}"
    exported = foldconv.export(network, path, tuple(network.inputs))
    if form.runs_on not in ("any", sys.platform):
        assert exported.error is None
        assert f"written, not checked: {form.name} runs on {form.runs_on} only" in str(exported)
        return
    assert exported.error <= form.tolerance
    # What it says is true of other inputs, too; of a batch that it was not tried with, where any will do.
    xs = [torch.randn(5 if form.any_batch else 2, *x.shape[1:]) for x in network.inputs]
    (found,) = run_file(form.runtime, path, [[x.numpy() for x in xs]], python=foldconv.deploy.apart.interpreter(form))
    for name, ours, theirs in zip(convs, network(*xs), found, strict=True):
        assert (ours - torch.from_numpy(theirs)).abs().max() <= form.tolerance * ours.abs().max(), name


class Crossed(nn.Module):
    """Outputs of one shape, not in the order in which they are computed, and an input that nobody reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, unread, x, y):
        first, second = self.second(y), self.first(x)
        return {"zeta": F.max_pool2d(second, 2), "alpha": F.max_pool2d(first - second, 2)}


class Read(nn.Module):
    """The same without that input."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, y):
        return self.network(None, x, y)


@each_format
def test_inputs_and_outputs_keep_their_order(suffix, tmp_path):
    form, network, path = need(suffix), Crossed(), tmp_path / f"net{suffix}"
    xs = [torch.randn(2 if form.any_batch else 1, 3, 8, 8) for _ in range(3)]
    if suffix == ".xml":  # which would leave it out, and take the next in its place
        with pytest.raises(UnsupportedError, match="of its inputs one is read by nothing, and would be left out"):
            foldconv.export(network, path, tuple(xs))
        network, xs = Read(network), xs[1:]
    error = foldconv.export(network, path, tuple(xs)).error
    assert (error is None) == (form.runs_on not in ("any", sys.platform))


@each_format
def test_a_network_on_images_is_described_and_run(suffix, tmp_path, monkeypatch):
    form = need(suffix)
    blocks = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2), nn.PReLU(2))
    x = torch.randn(2 if form.any_batch else 1, 3, 8, 8)
    network(x.repeat(4, 1, 1, 1))
    rich, path = foldconv.expand(network, "repvgg").train(), tmp_path / f"net{suffix}"
    with torch.no_grad():
        for value in rich.parameters():
            value += 0.1 * torch.randn_like(value)
    foldconv.export(rich, path, x, labels=["cat", "dog"], preprocessing={"mean": [0.5] * 3})
    if form.runs_on not in ("any", sys.platform):
        return
    compute, description = runner(path)
    assert description["labels"] == ["cat", "dog"]
    assert description["preprocessing"] == {"mean": [0.5] * 3}
    images = torch.randn(3, 1, 3, 8, 8)
    expected = torch.cat([rich.eval()(image) for image in images]).detach().numpy()
    assert np.abs(np.concatenate(compute([i.numpy() for i in images])) - expected).max() < 1e-4
    # Another function under this name is not left there.
    from foldconv.deploy import export as exporting

    ready = exporting.portable

    def wrong(folded, form):
        with torch.no_grad():
            folded[0].bias += 0.1
        return ready(folded, form)

    monkeypatch.setattr(exporting, "portable", wrong)
    path.unlink()
    with pytest.raises(FoldMismatchError, match="does not compute what the folded network does"):
        foldconv.export(rich, path, x, overwrite=True)
    assert not path.exists()
    # A damaged file is refused by its runtime in a line, and takes nobody with it.
    path.write_bytes(b"not a network")
    with pytest.raises((UnsupportedError, foldconv.CheckpointError)) as error:
        runner(path)[0]([images[0].numpy()])
    assert "\n" not in str(error.value)


def test_the_page_is_written_from_the_results_and_says_what_the_formats_do(page):
    found = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(found)
    assert list(found) == list(FORMATS)
    for suffix, column in found.items():
        assert list(column["outcomes"]) == list(page.kinds())
        for name, conv in page.kinds().items():
            outcome, refusal = column["outcomes"][name], page.refusal(conv, FORMATS[suffix])
            assert outcome == f"refused: {refusal}" if refusal else re.match(r"right|rewritten|written", outcome)
