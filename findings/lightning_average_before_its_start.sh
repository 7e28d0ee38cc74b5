#!/usr/bin/env bash
# Lightning's EMAWeightAveraging with update_starting_at_step validates and saves the weights of before training until that step, and update_starting_at_epoch averages from the first step on: early stopping and the best checkpoint go by another network than the one in training.
# Guessed before running: before its start there is no average, so the weights in training are validated and saved, and both arguments delay it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 lightning==2.6.6
env/bin/python -W ignore - <<'PY'
import logging
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Network(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm2d(1)
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        self.norm(batch + 3)
        return (self.w - 1).square().mean()

    def on_train_epoch_end(self):
        self.trained.append((round(self.w.item(), 3), round(self.norm.running_mean.item(), 3)))

    def validation_step(self, batch, index):
        self.validated.append((round(self.w.item(), 3), round(self.norm.running_mean.item(), 3)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, **start):
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.randn(40, 1, 4, 4), batch_size=4)
    checks = torch.utils.data.DataLoader(torch.randn(4, 1, 4, 4), batch_size=4)
    network = Network()
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[EMAWeightAveraging(decay=0.9, **start), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
    )
    trainer.fit(network, loader, checks)
    saved = [torch.load(f"{folder}/epoch={epoch}.ckpt", weights_only=False)["state_dict"] for epoch in range(4)]
    saved = [(round(each["w"].item(), 3), round(each["norm.running_mean"].item(), 3)) for each in saved]
    print(f"{start or 'no start given'}, ten steps an epoch; weight and running mean")
    print("  in training", network.trained, "\n  validated  ", network.validated, "\n  saved      ", saved)
    return network, saved


print(f"lightning {lightning.__version__}, torch {torch.__version__}")
late, saved = run("step", update_starting_at_step=25)
assert late.validated[:2] == saved[:2] == [(0, 0)] * 2 and min(late.trained[1]) > 0.8
epoch, _ = run("epoch", update_starting_at_epoch=2)
always, _ = run("always")
assert epoch.validated[:2] == always.validated[:2] != epoch.trained[:2]
PY
