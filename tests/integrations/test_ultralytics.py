"""ultralytics' trainer, validator and exporter, with the real package and no network: ``nox -s hosts``."""

import os
import subprocess
import sys

import pytest
import torch

os.environ["YOLO_OFFLINE"] = "true"
pytest.importorskip("ultralytics")

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


def test_a_plain_checkpoint_is_refused(run):
    with pytest.raises(foldconv.CheckpointError, match="expected an expanded network, found a plain DetectionModel"):
        fold_checkpoint(run[1] / "best.folded.pt")


class _Base:
    """What a trainer of ultralytics gives a mixin, for another number of classes and for a decay of scales."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        from ultralytics.nn.tasks import DetectionModel

        model = DetectionModel(cfg or "yolo11n.yaml", nc=self.classes, verbose=False)
        if weights:
            model.load(weights)
        return model

    def build_optimizer(self, model):
        kernels = {id(p): p for p in model.parameters() if p.ndim > 1}
        rest = [p for p in model.parameters() if id(p) not in kernels]
        groups = [{"params": rest, "weight_decay": 0.0, "param_group": "bn"}]
        groups += [{"params": list(kernels.values()), "weight_decay": 0.1, "param_group": "weight"}]
        return torch.optim.SGD(groups, lr=0.1)


class _Trainer(FoldConv, _Base):
    method = "orepa"
    options = {"include": "model.0.*"}  # noqa: RUF012
    classes = 3


def test_an_expanded_network_goes_on_with_other_classes_and_no_scale_decays():
    trainer = _Trainer()
    rich = trainer.get_model()
    assert [*foldable_layers(rich)] == ["model.0.conv"]
    with torch.no_grad():
        rich.model[0].conv.vector.mul_(1.5)
    trainer.classes = 5
    other = trainer.get_model(cfg=rich.yaml, weights=rich)
    assert torch.equal(other.model[0].conv.vector, rich.model[0].conv.vector)
    assert other.model[-1].nc == 5
    norms, kernels = trainer.build_optimizer(rich).param_groups
    assert any(p is rich.model[0].conv.vector for p in norms["params"])
    assert not any(p is rich.model[0].conv.vector for p in kernels["params"])
    count = sum(len(group["params"]) for group in (norms, kernels))
    assert count == len(list(rich.parameters()))


def test_the_trainer_is_ultralytics():
    from ultralytics.models.yolo.detect import DetectionTrainer

    assert issubclass(FoldConvTrainer, DetectionTrainer)
