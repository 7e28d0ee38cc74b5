"""Lightning's Trainer with one more callback: train expanded, deploy the module as it was written.

    python examples/lightning_module.py --epochs 5 --method doconv

Handwritten digits of scikit-learn (8×8, nothing is downloaded). `Digits` knows nothing of foldconv but the groups of
its optimizer. The fold that the callback leaves beside the best checkpoint is opened by `Digits.load_from_checkpoint`,
plain Lightning, and computes what the trained module computes.
"""

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import foldconv
import foldconv.lightning


def block(channels, out, stride=1):
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Digits(lightning.LightningModule):
    def __init__(self, width=16, lr=0.1, weight_decay=5e-4):
        super().__init__()
        self.save_hyperparameters()
        features = [block(1, width), block(width, 2 * width, 2), block(2 * width, 2 * width, 2)]
        self.net = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        # Plain or expanded: decay for kernels and what they are composed from, none for norms, biases and gates.
        groups = foldconv.parameter_groups(self, self.hparams.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=self.hparams.lr, momentum=0.9, nesterov=True)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    data = TensorDataset(images, torch.tensor(labels))
    train, test = torch.utils.data.random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, 64, shuffle=True), DataLoader(test, 256)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--method", default="doconv")
    parser.add_argument("--out", default="runs/lightning")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    train, test = loaders()
    best = ModelCheckpoint(options.out, "best", monitor="accuracy", mode="max")
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        callbacks=[best, foldconv.lightning.FoldConv(options.method)],  # the one changed line
        default_root_dir=options.out,
        accelerator="cpu",
        logger=False,
    )
    trainer.fit(module := Digits(), train, test)
    (trained,) = trainer.validate(module, test, ckpt_path="best")

    plain = Digits.load_from_checkpoint(best.best_model_path.replace(".ckpt", ".folded.ckpt")).eval()
    images = next(iter(test))[0]
    with torch.no_grad():
        expected, received = module.eval()(images), plain(images)
    difference = float((expected - received).abs().max() / expected.abs().max())
    kinds = sorted({type(layer).__name__ for layer in plain.modules() if isinstance(layer, nn.Conv2d)})
    print(f"accuracy {trained['accuracy']:.4f}; folded: {kinds}, largest difference {difference:.1e}")
    return trained["accuracy"], difference


if __name__ == "__main__":
    main()
