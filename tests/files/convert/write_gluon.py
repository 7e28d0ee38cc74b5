"""Write tests/fixtures/convert_gluon.npz and .params: a torch network, its output, and its weights as Gluon's file.

    python tests/convert/write_gluon.py

tests/gluon/test_convert.py loads them where MXNet is, and torch is not.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import foldconv
from foldconv.files.atomic import atomic_path
from foldconv.files.convert._params import write_params
from foldconv.testing import randomize

FIXTURES = Path(__file__).parents[2] / "fixtures"
# Gluon's names, as `save_parameters` writes them; the network is tests/gluon/test_convert.py's.
SHAPES = {
    "0.weight": (8, 3, 3, 3),
    "0.D": (3, 9, 12),
    "0.weight_extra": (8, 3, 3),
    **{f"1.{name}": (8,) for name in ("gamma", "beta", "running_mean", "running_var")},
    "3.weight": (8, 1, 3, 3),
    "3.bias": (8,),
    "4.weight": (8, 4, 2, 2),
    "4.bias": (4 * 2,),
    "6.weight": (5, 8 * 10 * 10),
    "6.bias": (5,),
}


def network():
    """DO-Conv, norm, depthwise DO-Conv, a transposed convolution of two groups, a linear layer on the map."""
    torch.manual_seed(0)
    net = nn.Sequential(
        foldconv.DOConv2d(3, 8, 3, bias=False, depth_multiplier=12),
        nn.BatchNorm2d(8, eps=1e-3),
        nn.ReLU(),
        foldconv.DOConv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 10 * 10, 5),
    )
    randomize(net)
    return net.eval()


def write(folder):
    """Both files, through `convert_weights` from torch's own."""
    net = network()
    x = torch.randn(2, 3, 9, 9)
    with atomic_path(folder / "convert_gluon.npz") as temporary:
        np.savez(temporary, input=x.numpy(), output=net(x).detach().numpy())
    made = folder / "made.params"
    write_params(made, {name: np.zeros(shape, "float32") for name, shape in SHAPES.items()})
    (folder / "convert_gluon.params").unlink(missing_ok=True)
    foldconv.convert_weights(net, folder / "convert_gluon.params", like=made)
    made.unlink()


if __name__ == "__main__":
    write(FIXTURES)
