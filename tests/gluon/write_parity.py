"""Write tests/fixtures/gluon_parity.npz: what torch's `foldconv.DOConv2d` computes. Run where torch is installed:

python tests/gluon/write_parity.py
"""

from pathlib import Path

import numpy as np
import torch

import foldconv
from foldconv._files import atomic_path

TARGET = Path(__file__).parent.parent / "fixtures" / "gluon_parity.npz"
GEOMETRIES = {
    "one_group": {"groups": 1, "padding": (1, 1)},
    "two_groups": {"groups": 2, "stride": (2, 1), "dilation": (1, 2), "depth_multiplier": 11},
}


def compute(groups, **geometry):
    layer = foldconv.DOConv2d(4, 6, 3, groups=groups, **geometry)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.D.mul_(0.3)
    x = torch.randn(2, 4, 8, 7, requires_grad=True)
    y = layer(x)
    probe = torch.randn_like(y)
    (y * probe).sum().backward()
    values = {"input": x, "output": y, "probe": probe, "kernel": layer.fold().weight, "grad.input": x.grad}
    for name, parameter in layer.named_parameters():
        values |= {f"state.{name}": parameter, f"grad.{name}": parameter.grad}
    return {name: value.detach().numpy() for name, value in values.items()}


def main():
    torch.manual_seed(0)
    values = {
        f"{case}/{name}": value for case, geometry in GEOMETRIES.items() for name, value in compute(**geometry).items()
    }
    with atomic_path(TARGET) as temporary:
        np.savez(temporary, **values)


if __name__ == "__main__":
    main()
