"""OpenMMLab: an expanded network through mmengine's Runner, from a config, and its fold by mmengine's own loader.

pip install . mmengine mmcv-lite
python examples/train_mm.py FOLDER
"""

# ruff: noqa: C408
import os
import sys
from pathlib import Path

import torch
from mmcv.cnn import ConvModule
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from mmengine.runner import Runner, load_checkpoint
from torch.utils.data import TensorDataset

import foldconv.mm  # in a config file: custom_imports = dict(imports=["foldconv.mm"])

# From torch 2.6 on, mmengine 0.10.7 resumes only so. Reading then runs code of the file's: for files of one's own.
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


@MODELS.register_module()
class StripesNet(BaseModel):
    def __init__(self, conv_cfg=None):
        super().__init__()
        usual = dict(padding=1, norm_cfg=dict(type="BN"), conv_cfg=conv_cfg)
        self.stem = ConvModule(1, 8, 3, **usual)
        self.body = ConvModule(8, 8, 3, stride=2, **usual)
        self.head = torch.nn.Linear(8, 2)

    def forward(self, images, labels=None, mode="tensor"):
        scores = self.head(self.body(self.stem(images)).mean((2, 3)))
        if mode == "loss":
            return dict(loss=torch.nn.functional.cross_entropy(scores, labels))
        return [scores.argmax(1) == labels] if mode == "predict" else scores


@METRICS.register_module()
class Accuracy(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples[0].tolist()

    def compute_metrics(self, results):
        return dict(top1=100 * sum(results) / len(results))


def stripes(count):
    labels = torch.arange(count) % 2
    images = torch.rand(count, 1, 16, 16)
    images[labels == 0, :, ::4] += 1
    images[labels == 1, :, :, ::4] += 1
    return TensorDataset(images, labels)


def runner(model, folder, epochs, **more):
    loader = dict(dataset=stripes(64), batch_size=16, collate_fn=dict(type="default_collate"))
    loader["sampler"] = dict(type="DefaultSampler", shuffle=True)
    watched = dict(dataloader=loader, cfg=dict(), evaluator=dict(type="Accuracy"))
    return Runner(
        model,
        str(folder),
        **{f"{stage}_{name}": value for stage in ("val", "test") for name, value in watched.items()},
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            constructor="FoldConvOptimWrapperConstructor", optimizer=dict(type="SGD", lr=0.1, momentum=0.9)
        ),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, save_best="top1", rule="greater")),
        custom_hooks=[dict(type="EMAHook", momentum=0.1), dict(type="FoldHook")],  # folded is the average then
        experiment_name=f"{Path(folder).name}_{epochs}",
        log_level="WARNING",
        **more,
    )


def main(folder, model=None):
    """Train an epoch, resume for three more, and test the fold in the plain network."""
    model = model or dict(type="StripesNet", conv_cfg=dict(type="DOConv2d", depth_multiplier=12))
    runner(model, folder, 1).train()
    resumed = runner(model, folder, 4, resume=True)
    resumed.train()
    load_checkpoint(resumed.model, str(Path(folder) / "epoch_4.pth"), strict=True)  # the average
    fold = str(Path(folder) / f"epoch_4{foldconv.mm.SUFFIX}.pth")
    plain = runner(dict(type="StripesNet"), Path(folder) / "fold", 0, load_from=fold)
    accuracy = plain.test()["top1"]
    with torch.no_grad():
        images = torch.rand(8, 1, 16, 16)
        expanded, folded = resumed.model.eval()(images), plain.model.eval()(images)
    error = ((expanded - folded).abs().max() / expanded.abs().max()).item()
    validated = resumed.message_hub.get_scalar("val/top1").current()
    return {"fold": fold, "validated": validated, "accuracy": accuracy, "error": error}


if __name__ == "__main__":
    print(main(sys.argv[1]))
