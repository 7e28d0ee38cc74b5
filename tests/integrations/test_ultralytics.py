"""ultralytics' trainer, validator and exporter, with the real package and no network: ``nox -s hosts``."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

os.environ["YOLO_OFFLINE"] = "true"
pytest.importorskip("ultralytics")

from ultralytics.models.yolo.segment import SegmentationTrainer

import foldconv
from foldconv.network.tree import foldable_layers
from foldconv.ultralytics import FoldConv, FoldConvTrainer, fold_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of ultralytics and torch


@pytest.fixture(scope="module")
def run(tmp_path_factory, import_example):
    """What the example did, and the folder of its weights."""
    folder = tmp_path_factory.mktemp("yolo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the trainer's class is pickled by no one, but runs/ would appear here
        done = import_example("train_ultralytics").main(folder)
    return done, folder / "run/weights"


def test_the_example(run):
    """Train, be stopped, resume, validate, export, fold; the expansion was there all along."""
    done, weights = run
    assert done["error"] < 1e-6
    assert done["layers"] > 40
    assert done["mAP50"][0] == done["mAP50"][1]
    assert {path.name for path in weights.iterdir()} >= {"best.folded.pt", "last.folded.pt"}
    network = torch.jit.load(done["exported"])
    from ultralytics.nn.tasks import load_checkpoint

    expanded, _ = load_checkpoint(weights / "best.pt")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        right, found = expanded.eval()(x)[0], network(x)
    assert (right - found).abs().max() < 1e-4 * right.abs().max()


def test_what_was_learnt_beside_the_kernel_is_there_after_resuming(run):
    from ultralytics.nn.tasks import load_checkpoint

    expanded, _ = load_checkpoint(run[1] / "last.pt")
    layers = [layer for layer in foldable_layers(expanded).values() if layer.D.shape[1] > 1]
    identity = [torch.eye(layer.D.shape[1]).expand_as(layer.D) for layer in layers]
    assert any(not torch.allclose(layer.D, eye, atol=1e-3) for layer, eye in zip(layers, identity))


def test_the_fold_is_loaded_where_foldconv_is_not(run):
    code = "import sys; sys.modules['foldconv'] = None; from ultralytics import YOLO; import torch; "
    code += "yolo = YOLO(sys.argv[1]); print(float(yolo.model.eval()(torch.ones(1, 3, 64, 64))[0].double().sum()))"
    command = [sys.executable, "-c", code, str(run[1] / "best.folded.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    from ultralytics import YOLO

    with torch.no_grad():
        right = YOLO(run[1] / "best.pt").model.float().eval()(torch.ones(1, 3, 64, 64))[0].double().sum()
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(float(right), rel=1e-5)


class _Segmenter(FoldConv, SegmentationTrainer):
    method = "repvgg"


def test_a_segmentation_with_branches(tmp_path, import_example, monkeypatch):
    """Its norms are found (YOLO chooses a loss by a local name), and what is folded is what was trained."""
    from ultralytics import YOLO

    monkeypatch.chdir(tmp_path)
    data = import_example("train_ultralytics").squares(tmp_path / "data", count=4)
    for path in (tmp_path / "data" / "labels").rglob("*.txt"):
        label, x, y, width, height = map(float, path.read_text().split())
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        corners = (left, top, right, top, right, bottom, left, bottom)
        path.write_text(f"{int(label)} " + " ".join(map(str, corners)))
    options = {"data": data, "imgsz": 64, "batch": 2, "epochs": 1, "device": "cpu", "workers": 0, "plots": False}
    options |= {"amp": False, "pretrained": False, "project": str(tmp_path), "name": "run", "trainer": _Segmenter}
    YOLO("yolo11n-seg.yaml").train(**options)
    images, outputs = torch.rand(2, 3, 64, 64), []
    for name in ("best.pt", "best.folded.pt"):
        network = YOLO(tmp_path / "run/weights" / name).model.float().eval()
        assert len(foldable_layers(network)) == (50 if name == "best.pt" else 0)
        with torch.no_grad():
            outputs.append(network(images)[0])
    for rich, folded in zip(*outputs, strict=True):  # boxes with coefficients, and the masks' prototypes
        assert (rich - folded).abs().max() < 1e-4 * rich.abs().max()


def test_a_plain_checkpoint_is_refused(run):
    with pytest.raises(foldconv.CheckpointError, match="expected an expanded network, found a plain DetectionModel"):
        fold_checkpoint(run[1] / "best.folded.pt")


class _Trainer(FoldConvTrainer):
    method = "orepa"
    options = {"include": "model.0.*"}  # noqa: RUF012

    def __init__(self, classes):  # without a data set
        self.data = {"nc": classes, "channels": 3}
        self.args = SimpleNamespace(cls_remap=False)


def test_an_expanded_network_goes_on_with_other_classes():
    rich = _Trainer(3).get_model("yolo11n.yaml", verbose=False)
    assert [*foldable_layers(rich)] == ["model.0.conv"]
    with torch.no_grad():
        rich.model[0].conv.vector.mul_(1.5)
    other = _Trainer(5).get_model(cfg=rich.yaml, weights=rich, verbose=False)
    assert torch.equal(other.model[0].conv.vector, rich.model[0].conv.vector)
    assert other.model[-1].nc == 5


@pytest.mark.parametrize("name", ["SGD", "MuSGD"])
def test_scales_neither_decay_nor_are_made_orthogonal(name):
    trainer = _Trainer(3)
    rich = trainer.get_model("yolo11n.yaml", verbose=False)
    groups = trainer.build_optimizer(rich, name=name, lr=0.01, decay=0.1).param_groups
    vector = rich.model[0].conv.vector
    (own,) = [group for group in groups if any(p is vector for p in group["params"])]
    assert (own["weight_decay"], own["lr"], own.get("use_muon", False)) == (0.0, 0.01, False)
    assert any(group["weight_decay"] == 0.1 for group in groups)
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(map(id, rich.parameters()))
