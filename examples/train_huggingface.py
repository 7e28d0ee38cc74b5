"""Hugging Face: an expanded image classifier through Trainer, and its fold by transformers' own from_pretrained.

    pip install foldconv transformers accelerate
    python examples/train_huggingface.py FOLDER

With `--push USER/NAME` the fold goes to the hub, with a model card.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

import foldconv.hub


class Stripes(Dataset):
    """Noisy images; the class is the direction of their stripes."""

    def __init__(self, count=64):
        self.labels = torch.arange(count) % 2
        self.images = torch.rand(count, 3, 32, 32)
        self.images[self.labels == 0, :, ::4] += 1
        self.images[self.labels == 1, :, :, ::4] += 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def trainer(model, folder, epochs):
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        save_strategy="epoch",
        eval_strategy="epoch",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    # Trainer would decay the scales and gates of some methods; parameter_groups does not.
    optimizer = torch.optim.AdamW(foldconv.parameter_groups(model, 1e-4), lr=0.01)
    data = {"train_dataset": Stripes(), "eval_dataset": Stripes()}
    return Trainer(model, arguments, **data, compute_metrics=accuracy, optimizers=(optimizer, None))


def main(folder, method="doconv", push=None):
    """Train an epoch, resume for three more, take the model from its checkpoint, and fold it."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    plain = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=2))  # or from_pretrained(...)
    model = foldconv.hub.expand(plain, method)
    trainer(model, folder, 1).train()

    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    model = foldconv.hub.from_pretrained(last, ResNetForImageClassification)  # with all that is trained
    going_on = trainer(model, folder, 4)
    going_on.train(resume_from_checkpoint=str(last))
    metrics = going_on.evaluate()

    foldconv.hub.save_fold(model, Path(folder) / "fold", text="Tells horizontal from vertical stripes.")
    if push:
        print(foldconv.hub.push_to_hub(model, push, text="Tells horizontal from vertical stripes."))
    folded = AutoModelForImageClassification.from_pretrained(Path(folder) / "fold")
    images = Stripes(8).images
    with torch.no_grad():
        before, after = model.eval()(images).logits, folded(images).logits
    return {
        "accuracy": metrics["eval_accuracy"],
        "accuracy of the fold": trainer(folded, folder, 1).evaluate()["eval_accuracy"],
        "error": ((before - after).abs().max() / before.abs().max()).item(),
        "epochs": going_on.state.epoch,
    }


if __name__ == "__main__":
    print(main(sys.argv[1], push=sys.argv[3] if "--push" in sys.argv else None))
