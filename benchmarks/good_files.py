"""A good file of each kind that foldconv reads, for fuzz.py to change."""

import functools
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import torch
import yaml
from torch import nn

import foldconv
from foldconv.lab.train.building import build
from foldconv.lab.train.config import TrainConfig


def network():
    """A network that every kind of file is about."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2))


@functools.cache
def original():
    """A checkpoint of DO-Conv's authors for its first and last convolution."""
    eye = torch.eye(9)
    state = {k: v for k, v in network().state_dict().items() if not k.endswith("weight") or k.startswith("1")}
    for name, out, channels, inside in (("0", 4, 3, 3), ("3", 6, 4, 2)):
        state[f"{name}.W"] = torch.randn(out, inside, 9)
        state[f"{name}.D"], state[f"{name}.d_diag"] = torch.randn(channels, 9, 9), eye.repeat(channels, 1, 1)
    return state


@functools.cache
def run():
    """A checkpoint of a run, and the network in it."""
    config = TrainConfig(method="doconv", architecture_args={"width": 4})

    class Digits:
        classes = preprocessing = None
        num_classes, input_shape, name = 10, (1, 8, 8), "digits"

    rich, description = build(config, Digits())
    state = {f"network.{name}": value for name, value in rich.state_dict().items()}
    return {"state_dict": state, "foldconv": description, "global_step": 3, "epoch": 1}


@functools.cache
def described():
    """The bytes of `foldconv.save`."""
    with tempfile.TemporaryDirectory() as folder:
        rich = foldconv.expand(network(), foldconv.DOConv(depth_multiplier=12))
        foldconv.save(rich, f"{folder}/a", extra={"architecture": "digits_resnet", "numbers": [1, 2.5, None]})
        return Path(folder, "a").read_bytes()


def arrays():
    """Images in Keras' layout."""
    x, y = np.zeros((6, 8, 8), "uint8"), np.arange(6)
    return {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2], "classes": np.array(list("abcdef"))}


@functools.cache
def keras_file():
    """A .keras file of two layers, as Keras 3 writes it."""
    layers = [
        {
            "module": "keras.layers",
            "class_name": "InputLayer",
            "config": {"batch_shape": [None, 8, 8, 3], "name": "in"},
        },
        {
            "module": "keras.layers",
            "class_name": "Conv2D",
            "config": {"name": "conv2d", "filters": 4, "kernel_size": [3, 3], "groups": 1, "use_bias": False},
        },
        {
            "module": "keras.layers",
            "class_name": "BatchNormalization",
            "config": {"name": "batch_normalization", "axis": -1, "epsilon": 1e-3, "center": True, "scale": True},
        },
    ]
    config = {"module": "keras", "class_name": "Sequential", "config": {"name": "net", "layers": layers}}
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        file["layers/conv2d/vars/0"] = np.ones((3, 3, 3, 4), "float32")
        for number in range(4):
            file[f"layers/batch_normalization/vars/{number}"] = np.ones(4, "float32")
    records = {
        "metadata.json": b"{}",
        "config.json": json.dumps(config).encode(),
        "model.weights.h5": weights.getvalue(),
    }
    return packed(records)


@functools.cache
def gluon_arrays():
    """A convolution and its norm, as Gluon's `save_parameters` names them."""
    norm = {f"1.{name}": np.ones(4, "float32") for name in ("gamma", "beta", "running_mean", "running_var")}
    return {"0.weight": np.ones((4, 3, 3, 3), "float32"), **norm}


def gluon_file(arrays):
    """The bytes of a .params file."""
    from foldconv.files.convert._params import write_params

    with tempfile.TemporaryDirectory() as folder:
        write_params(f"{folder}/a.params", arrays)
        return Path(folder, "a.params").read_bytes()


def packed(records, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def torch_file(tree, **options):
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


def good_npz():
    np.savez(buffer := io.BytesIO(), **arrays())
    return buffer.getvalue()


GOOD = {
    "pth": lambda: torch_file(original()),
    "ckpt": lambda: torch_file(run()),
    "safetensors": described,
    "yaml": lambda: yaml.safe_dump(TrainConfig().to_dict()).encode(),
    "npz": good_npz,
    "keras": keras_file,
    "params": lambda: gluon_file(gluon_arrays()),
}
"""What is changed, unchanged: refusals of it would say nothing."""
