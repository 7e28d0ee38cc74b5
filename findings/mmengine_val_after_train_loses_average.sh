#!/usr/bin/env bash
# mmengine's Runner.val() after train(), with EMAHook and save_best: it validates the last weights, not their average, and, where they do better, writes them over the last epoch's checkpoint in the average's place.
# Guessed before running: val() validates the average, as train() does after every epoch, and writes nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
uv venv --quiet env
uv pip install --quiet --python env/bin/python torch==2.15.0 mmengine==0.10.7
env/bin/python - <<'PY'
import mmengine
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, mode="tensor"):
        return dict(loss=((self.w - 1) ** 2).mean()) if mode == "loss" else [self.w.detach().clone()]


class Value(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(data_samples[0].item())

    def compute_metrics(self, results):
        return dict(w=results[0])


loader = dict(dataset=torch.zeros(4, 1), batch_size=4, collate_fn=dict(type="default_collate"))
loader["sampler"] = dict(type="DefaultSampler", shuffle=False)
Net.train_step = lambda self, data, optim_wrapper: optim_wrapper.update_params(self(data, mode="loss")["loss"]) or {}
Net.val_step = lambda self, data: self(data)
runner = Runner(
    Net(), "run", train_dataloader=loader, val_dataloader=loader, val_evaluator=Evaluator([Value()]), val_cfg=dict(),
    train_cfg=dict(by_epoch=True, max_epochs=5), optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
    default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, save_best="w", rule="greater"), logger=None),
    custom_hooks=[dict(type="EMAHook", momentum=0.1)], log_level="ERROR",
)
saved = lambda: torch.load("run/epoch_5.pth", weights_only=False)["state_dict"]["w"].item()
runner.train()
average = saved()
validated, now = runner.val()["w"], saved()
print(f"mmengine {mmengine.__version__}: the average in epoch_5.pth is {average:.3f}; val() says {validated:.3f}, and epoch_5.pth holds {now:.3f}")
assert average < 0.5 < validated == now
PY
