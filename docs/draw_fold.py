"""Draw docs/fold.png: one DO-Conv layer while training and after folding, with its real kernels and outputs.

    python docs/draw_fold.py            (needs the train extra)

The layer learns to sharpen scikit-learn's digits; the pictures are what it holds when it is done.
"""

from pathlib import Path

import matplotlib

import foldconv

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch
from sklearn.datasets import load_digits


def train():
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:400, None] / 16.0, dtype=torch.float32)
    sharpen = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 5.0, -1.0], [0.0, -1.0, 0.0]]).reshape(1, 1, 3, 3)
    target = torch.nn.functional.conv2d(images, sharpen, padding=1)
    layer = foldconv.DOConv2d(1, 1, 3, padding=1, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(layer(images), target).backward()
        optimizer.step()
    return layer.eval(), images[:1]


def panel(figure, box, values, title, note=""):
    axes = figure.add_axes(box)
    bound = float(abs(values).max()) or 1.0
    gray = title in ("input", "output")
    axes.imshow(values, cmap="gray" if gray else "RdBu_r", vmin=None if gray else -bound, vmax=None if gray else bound)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(note, fontsize=8)


def arrow(figure, start, end, label=""):
    figure.add_artist(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color="0.35"))
    figure.text((start[0] + end[0]) / 2, start[1] + 0.03, label, ha="center", fontsize=9, color="0.35")


@torch.no_grad()
def draw(layer, image, path):
    plain = layer.fold()
    identity = torch.eye(9)
    figure = plt.figure(figsize=(9.6, 4.6))
    figure.text(0.02, 0.94, "while training: DOConv2d", fontsize=12, weight="bold")
    figure.text(0.02, 0.44, "deployed: nn.Conv2d", fontsize=12, weight="bold")
    width, height = 0.13, 0.27
    for row, (module, bottom) in enumerate(((layer, 0.58), (plain, 0.08))):
        middle = bottom + height / 2
        panel(figure, (0.02, bottom, width, height), image[0, 0], "input")
        panel(figure, (0.85, bottom, width, height), module(image)[0, 0], "output")
        arrow(figure, (0.78, middle), (0.845, middle))
        if row == 0:
            panel(figure, (0.24, bottom, width, height), layer.D[0] + identity, "D", "9×9, learned")
            panel(figure, (0.44, bottom, width, height), layer.weight[0, 0], "W", "3×3, learned")
            figure.text(0.405, middle, "∘", fontsize=18, ha="center", va="center")
            figure.text(0.605, middle, "=", fontsize=18, ha="center", va="center")
            panel(figure, (0.64, bottom, width, height), layer.kernel()[0, 0], "kernel", "3×3, composed")
            arrow(figure, (0.155, middle), (0.235, middle))
        else:
            panel(figure, (0.64, bottom, width, height), plain.weight[0, 0], "weight", "3×3, all that is left")
            arrow(figure, (0.155, middle), (0.635, middle))
    gap = (layer(image) - plain(image)).abs().max().item()
    figure.text(0.395, 0.12, f"largest difference of the outputs: {gap:.0e}", fontsize=9, ha="center", color="0.35")
    figure.savefig(path, dpi=110)
    print(f"{path.name}: largest difference {gap:.1e}")


if __name__ == "__main__":
    draw(*train(), Path(__file__).with_name("fold.png"))
