"""segmentation_models_pytorch: an expanded U-Net in a plain loop, and its fold by smp's own from_pretrained.

pip install foldconv segmentation-models-pytorch
python examples/train_smp.py FOLDER
"""

import sys
from pathlib import Path

import segmentation_models_pytorch as smp
import torch

import foldconv


def discs(count=32, size=64):
    """Noisy images with one bright disc each, and its mask."""
    places = torch.randint(16, size - 16, (count, 2, 1, 1))
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None, :]
    masks = ((rows - places[:, 0]) ** 2 + (columns - places[:, 1]) ** 2 < 12**2).float()[:, None]
    return torch.rand(count, 3, size, size) + masks, masks


def train(network, optimizer, epochs):
    images, masks = discs()
    loss = smp.losses.DiceLoss("binary")
    network.train()
    for _ in range(epochs):
        for batch in torch.arange(len(images)).split(8):
            optimizer.zero_grad()
            loss(network(images[batch]), masks[batch]).backward()
            optimizer.step()


@torch.no_grad()
def intersection_over_union(network):
    torch.manual_seed(1)
    images, masks = discs()
    counts = smp.metrics.get_stats((network.eval()(images) > 0).long(), masks.long(), mode="binary")
    return smp.metrics.iou_score(*counts, reduction="micro").item()


def main(folder, method="doconv"):
    """Train, save, resume from the file, evaluate, fold, and load the fold."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}
    plain = smp.Unet("resnet18", encoder_weights=None, **sizes)  # or encoder_weights="imagenet"
    network = foldconv.expand(plain, method, example_inputs=torch.zeros(2, 3, 64, 64))
    optimizer = torch.optim.AdamW(foldconv.parameter_groups(network, 1e-4), lr=3e-3)
    train(network, optimizer, 1)
    foldconv.save(network, folder / "network.safetensors", extra={"epoch": 1})
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    network = foldconv.load(folder / "network.safetensors", plain)
    optimizer = torch.optim.AdamW(foldconv.parameter_groups(network, 1e-4), lr=3e-3)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    train(network, optimizer, 3)

    foldconv.fold(network).save_pretrained(folder / "fold")  # smp's own: config.json and model.safetensors
    folded = smp.from_pretrained(folder / "fold").eval()
    scores = {"IoU": intersection_over_union(network), "IoU of the fold": intersection_over_union(folded)}
    images = discs(4)[0].double()
    with torch.no_grad():
        before, after = network.double()(images), folded.double()(images)
    return scores | {"error": ((before - after).abs().max() / before.abs().max()).item()}


if __name__ == "__main__":
    print(main(sys.argv[1]))
