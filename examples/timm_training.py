"""A training loop of timm's own parts with one changed line, and a checkpoint that `timm.create_model` loads.

    python examples/timm_training.py --model test_resnet --method doconv --epochs 5

Handwritten digits of scikit-learn, enlarged to 32×32 (nothing is downloaded). The optimizer, the schedule, the average
of the weights and the saver are timm's, and see an ordinary network. With methods that have scales or gates of two
dimensions (OREPA, DG-Conv), give `create_optimizer_v2` the groups of `foldconv.parameter_groups(model, weight_decay)`
in the model's place: timm would decay these, too.
"""

import argparse
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import foldconv


def loaders():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    data = TensorDataset(nn.functional.interpolate(images, 32), torch.tensor(labels))
    train, test = torch.utils.data.random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, 256)


@torch.no_grad()
def validate(model, loader):
    model.eval()
    right = sum(len(y) * float(accuracy(model(x), y)[0]) for x, y in loader)
    return right / len(loader.dataset)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--method", default="doconv")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", default="runs/timm")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, test = loaders()
    made = {"model_name": options.model, "num_classes": 10, "in_chans": 1}

    model = timm.create_model(**made)
    model = foldconv.expand(model, options.method)  # the one changed line
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=5e-4, momentum=0.9)
    schedule, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=options.epochs, warmup_epochs=0)
    average = ModelEmaV3(model, decay=0.9)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, options, average, checkpoint_dir=options.out, max_history=1)
    for epoch in range(epochs):
        model.train()
        for images, labels in train:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
        schedule.step(epoch + 1)
        top1 = validate(average.module, test)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {top1:.2f} %")
        saver.save_checkpoint(epoch, metric=top1)

    # The best epoch's average, as timm itself would validate it, folded into what timm loads.
    model.load_state_dict(foldconv.read_weights(Path(options.out, "model_best.pth.tar")))
    folded = Path(options.out, "folded.pth")
    torch.save(foldconv.fold(model).state_dict(), folded)
    plain = timm.create_model(**made, checkpoint_path=folded).eval()
    with torch.no_grad():
        images = next(iter(test))[0]
        expected, received = model.eval()(images), plain(images)
    difference = float((expected - received).abs().max() / expected.abs().max())
    print(f"best test accuracy {saver.best_metric:.2f} %, folded {validate(plain, test):.2f} %", end="; ")
    print(f"largest difference {difference:.1e}")
    return saver.best_metric, validate(plain, test), difference


if __name__ == "__main__":
    main()
