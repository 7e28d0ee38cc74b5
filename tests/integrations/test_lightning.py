"""The callback: expanded before the optimizer, resumed exactly, folded into what the plain module loads."""

import logging

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import foldconv
from foldconv.errors import CheckpointError, NoMatchError, UnsupportedError
from foldconv.layers import Foldable
from foldconv.lightning import FoldConv, fold_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on speed, and torch's on Lightning
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False) | {"accelerator": "cpu"}
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DATA = DataLoader(TensorDataset(IMAGES, torch.arange(24) % 4), 8)


class Module(lightning.LightningModule):
    def __init__(self, width=6, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        parts = [nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3)]
        self.net = nn.Sequential(*parts, nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 4))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        groups = foldconv.parameter_groups(self, 0.25)
        optimizer = torch.optim.SGD(groups, lr=self.hparams.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Whole(Module):
    def forward(self, images):
        return self.net(images)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = self.trainer.max_epochs  # which asks for the trainer

    def on_load_checkpoint(self, checkpoint):
        self.vocabulary = checkpoint["vocabulary"]


def trainer(folder, *callbacks, epochs=2, **options):
    kept = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    return lightning.Trainer(callbacks=[kept, *callbacks], max_epochs=epochs, **QUIET, **options)


def test_expanded_trained_resumed_evaluated_folded(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for cls, method, init in (
        (Whole, foldconv.DOConv(depth_multiplier=12), "preserve"),
        (Module, "repvgg", "preserve"),
        (Whole, "orepa", "paper"),
    ):
        folder = tmp_path / cls.__name__ / init
        module = cls()
        caplog.clear()
        trainer(folder, FoldConv(method, init=init)).fit(module, DATA, DATA)
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("foldconv: ")]
        assert "in 2 of 2 convolutions of" in lines[0]
        assert len(lines) == 2
        assert "folded" in lines[1]
        # Its own layers have all been trained, and the groups are those of the expanded module.
        (optimizer,) = module.trainer.optimizers
        expected = foldconv.parameter_groups(module, 0.25)
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(g["params"]) for g in expected]
        assert all(optimizer.state[p] for group in optimizer.param_groups for p in group["params"])

        # From the first epoch's checkpoint on, in a fresh module: the same weights.
        again = cls()
        other = trainer(folder / "again", FoldConv(method, init=init))
        other.fit(again, DATA, DATA, ckpt_path=folder / "epoch=0.ckpt")
        state, resumed = module.state_dict(), again.state_dict()
        assert state.keys() == resumed.keys()
        assert all(torch.equal(state[key], resumed[key]) for key in state)

        # Evaluated from the checkpoint by a module that was never trained.
        (wanted,) = module.trainer.validate(module, DATA, verbose=False)
        evaluator = lightning.Trainer(callbacks=[FoldConv(method)], enable_checkpointing=False, **QUIET)
        (found,) = evaluator.validate(cls(), DATA, ckpt_path=folder / "epoch=1.ckpt", verbose=False)
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)

        # The fold is what plain Lightning opens, hyperparameters and the module's own entries included.
        plain = cls.load_from_checkpoint(folder / "epoch=1.folded.ckpt").eval()
        assert not any(isinstance(layer, Foldable) for layer in plain.modules())
        assert plain.hparams.lr == 0.05
        assert getattr(plain, "vocabulary", 2) == 2
        with torch.no_grad():
            expected, received = module.eval().net(IMAGES), plain.net(IMAGES)
            assert (expected - received).abs().max() < 1e-6 * expected.abs().max()
            folded = foldconv.fold(module)
            assert torch.equal(folded.net(IMAGES), received)
        # By hand: from the file alone, in a process that knows the plain module only.
        byhand = fold_checkpoint(folder / "epoch=1.ckpt", cls(), tmp_path / f"{cls.__name__}-{init}.ckpt")
        content = torch.load(byhand, weights_only=True)
        assert all(torch.equal(content["state_dict"][key], value) for key, value in plain.state_dict().items())
        assert not {"optimizer_states", "callbacks", "loops"} & content.keys()
        # And read by whoever reads other people's files.
        weights = foldconv.read_weights(folder / "epoch=1.folded.ckpt")
        assert torch.equal(weights["0.weight"], plain.net[0].weight)


def test_a_second_fit_goes_on_and_a_folded_module_is_expanded_again(tmp_path):
    module, callback = Module(), FoldConv("doconv", fold=False)
    trainer(tmp_path, callback, epochs=1).fit(module, DATA)
    first = module.net[0].D
    trainer(tmp_path / "more", callback, epochs=1).fit(module, DATA)
    assert module.net[0].D is first
    folded = foldconv.fold(module)
    trainer(tmp_path / "again", callback, epochs=1).fit(folded, DATA)
    assert type(folded.net[0]).__name__ == "DOConv2d"
    assert not list(tmp_path.rglob("*.folded.ckpt"))


def test_averages_are_what_is_folded(tmp_path):
    module = Whole()
    callbacks = FoldConv("doconv"), EMAWeightAveraging(decay=0.5)
    with pytest.raises(UnsupportedError, match=r"EMAWeightAveraging stands before FoldConv .* expected FoldConv first"):
        trainer(tmp_path, *reversed(callbacks)).fit(module, DATA)
    trainer(tmp_path, *callbacks).fit(module, DATA)
    content = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    module.load_state_dict(content["state_dict"])
    plain = Whole.load_from_checkpoint(tmp_path / "epoch=1.folded.ckpt")
    assert torch.allclose(foldconv.fold(module).net[3].weight, plain.net[3].weight, atol=1e-7)
    current = content["current_model_state"]["net.3.weight"]
    assert not torch.allclose(current, content["state_dict"]["net.3.weight"], atol=1e-4)


class Two(Module):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 3, 3)

    def training_step(self, batch, index):
        return super().training_step((self.other(nn.functional.pad(batch[0], (1, 1, 1, 1))), batch[1]), index)


class Late(Module):
    def setup(self, stage):
        self.late = nn.Conv2d(1, 1, 1)


class OwnParameters(Module):
    def __init__(self):
        super().__init__()
        self.chosen = [*self.parameters()]

    def configure_optimizers(self):
        return torch.optim.SGD(self.chosen, lr=0.1)


class Empty(lightning.LightningModule):
    training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

    def configure_model(self):
        self.net = Module().net


def test_what_is_expanded(tmp_path, caplog):
    def fit(module, *callbacks):
        options = QUIET | {"enable_checkpointing": False}
        lightning.Trainer(callbacks=[*callbacks], fast_dev_run=True, **options).fit(module, DATA)
        return {name for name, layer in module.named_modules() if isinstance(layer, Foldable)}

    assert fit(Two(), FoldConv(network="other")) == {"other"}
    assert fit(Two(), FoldConv(network="net", include="3"), FoldConv(network="other")) == {"net.3", "other"}
    with pytest.raises(UnsupportedError, match=r"Two has no forward, and convolutions in net, other; .*'net'"):
        fit(Two(), FoldConv())
    with pytest.raises(UnsupportedError, match=r"network: Two has no 'nett'; expected .*net, other"):
        fit(Two(), FoldConv(network="nett"))
    with pytest.raises(NoMatchError, match=r"build it in __init__, or call foldconv.expand"):
        fit(Empty(), FoldConv())
    with pytest.raises(UnsupportedError, match="unknown method 'doconvv'"):
        FoldConv("doconvv")
    rich = foldconv.expand(Whole(), "doconv")
    assert fit(rich, FoldConv(None)) == {"net.0", "net.3"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    fit(Late(), FoldConv())
    assert "1 convolutions stay as they are (late): setup() or configure_model()" in caplog.text
    caplog.clear()
    fit(OwnParameters(), FoldConv())
    assert "no optimizer has net.0.D: parameters that configure_optimizers takes" in caplog.text


def test_files_that_are_no_such_checkpoint(tmp_path, caplog):
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other.ckpt: expected a checkpoint of Lightning's Trainer"):
        fold_checkpoint(tmp_path / "other.ckpt", Module())
    module = Module()
    trainer(tmp_path, FoldConv("doconv"), epochs=1).fit(module, DATA)
    with pytest.raises(CheckpointError, match=r"epoch=0.ckpt: does not fit Module.*misshapen"):
        fold_checkpoint(tmp_path / "epoch=0.ckpt", Module(width=7))
    # A diverged run keeps its checkpoints, and a line says why there is no fold.
    with torch.no_grad():
        module.net[0].weight.fill_(float("nan"))
    trainer(tmp_path / "nan", FoldConv("doconv"), epochs=1).fit(module, DATA)
    assert (tmp_path / "nan" / "epoch=0.ckpt").exists()
    assert not (tmp_path / "nan" / "epoch=0.folded.ckpt").exists()
    assert "is not folded: net.0: expected a finite kernel" in caplog.text
