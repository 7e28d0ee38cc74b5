"""Good files, changed at random: the cases of fuzz.py."""

import argparse
import copy
import io
import json
import os
import pickle
import struct
import warnings
import zipfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import yaml
from good_files import (
    arrays,
    described,
    gluon_arrays,
    gluon_file,
    keras_file,
    network,
    original,
    packed,
    run,
    torch_file,
)
from torch import nn

import foldconv
from foldconv.lab.data.npz import read_npz
from foldconv.lab.train.checkpoint import open_network
from foldconv.lab.train.config import TrainConfig


class Hostile:
    """Its pickle makes a folder when it is read without care."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-checkpoint",)


DEEP = "@deep@"
ODD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    1 << 31,
    -(1 << 63),
    10**4500,
    1e308,
    float("nan"),
    "",
    "x" * 100_000,
    "../..",
    "\ud800",
]
ODD += ["doconv", "9", [], {}, [[]], [1] * 1000, {"a": 1}, DEEP]


def odd_tensors(rng, tensor):
    """Something else in the place of a tensor."""
    if not isinstance(tensor, torch.Tensor):
        tensor = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        makers = [
            lambda: tensor.tolist(),
            lambda: tensor.numpy(),
            lambda: tensor.to(
                rng.choice([torch.int64, torch.bool, torch.complex64, torch.float16, torch.float8_e4m3fn])
            ),
            lambda: tensor.double() * 1e300,
            lambda: tensor.to_sparse(),
            lambda: tensor.to("meta"),
            lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            lambda: tensor.flatten()[: rng.randrange(9)],
            lambda: tensor[None].expand(rng.choice([2, 10**6, 10**12]), *tensor.shape),
            lambda: tensor.unsqueeze(-1),
            lambda: tensor * float("nan"),
            lambda: torch.tensor(3),
            lambda: nn.Parameter(tensor.float()),
            lambda: argparse.Namespace(lr=0.1),
            Hostile,
        ]
        return rng.choice(makers)()


def places(tree):
    """Every container in a tree with each of its keys; a container that is there many times counts once."""
    found, waiting, seen = [], [tree], {id(tree)}
    while waiting:
        inside = waiting.pop()
        for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
            found.append((inside, key))
            if isinstance(inside[key], (dict, list)) and id(inside[key]) not in seen:
                seen.add(id(inside[key]))
                waiting.append(inside[key])
    return found


def changed_tree(rng, tree, odd):
    """The values of a file, some of them others."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        spots = places(tree)
        if not spots:
            break
        inside, key = rng.choice(spots)
        other, another = rng.choice(spots)
        change = rng.randrange(8)
        if change == 0:
            del inside[key]
        elif change == 1 and isinstance(inside, dict) and isinstance(key, str):
            name = rng.choice([key + "x", key[:-1], key * 1000, "module." + key, "_orig_mod." + key, "", key.upper()])
            inside[name] = inside[key] if rng.random() < 0.5 else inside.pop(key)
        elif change == 2:
            inside[key] = other[another]
        elif change == 3:
            for _ in range(rng.choice([1, 3, 60])):
                inside[key] = [inside[key]]
        elif change == 4:  # the same thing many times: aliases in YAML, references in a pickle
            for _ in range(rng.choice([1, 3, 12])):
                inside[key] = [inside[key]] * 9
        else:
            inside[key] = odd(rng, inside[key])
    return tree


def odd_value(rng, _):
    return rng.choice(ODD)


def text_of(tree, write):
    """As JSON or YAML; some of it nested too deeply for their writers."""
    try:
        text = write(tree)
    except Exception:  # aliases that would fill the memory, numbers that Python does not print
        text = write(None)
    return text.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).replace(f"'{DEEP}'", "[" * 5000 + "]" * 5000)


def small_json(tree):
    """JSON that stays below a few megabytes: aliases are written out."""
    pieces, size = [], 0
    for piece in json.JSONEncoder().iterencode(tree):
        size += len(piece)
        if size > 4 << 20:
            raise ValueError("too long")
        pieces.append(piece)
    return "".join(pieces)


def changed_bytes(rng, data):
    """Flipped bits, lost, doubled and foreign pieces, another end."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 4, 8, 100])
        change = rng.randrange(6)
        if change == 0:
            del data[at:]
        elif change == 1:
            del data[at : at + length]
        elif change == 2:
            data[at:at] = data[at : at + length] * rng.choice([1, 2, 50])
        elif change == 3:
            data[at : at + 8] = struct.pack("<q", rng.choice([0, -1, 1 << 31, (1 << 63) - 1, rng.randrange(1 << 40)]))
        elif change == 4:
            data[at:at] = rng.randbytes(length)
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def records_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def changed_records(rng, data):
    """An archive whose checksums are right, and whose records are not."""
    records = records_of(data)
    name = rng.choice(list(records))
    change = rng.randrange(6)
    if change == 0:
        del records[name]
    elif change == 1:
        records[name] = records[rng.choice(list(records))]
    elif change == 2:
        records[name[:-1]] = records.pop(name)
    elif change == 3:
        records[name] = bytes(1 << 22)
    else:
        records[name] = changed_bytes(rng, records[name])
    return packed(records, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def changed_torch(make):
    """Changes of a checkpoint in a pickle."""

    def change(rng):
        tree, way = make(), rng.randrange(4)
        if way == 0:
            return changed_bytes(rng, torch_file(tree, _use_new_zipfile_serialization=rng.random() < 0.7))
        if way == 1:
            return changed_records(rng, torch_file(tree))
        tree = changed_tree(rng, tree, lambda rng, v: odd_tensors(rng, v) if rng.random() < 0.7 else odd_value(rng, v))
        try:
            return torch_file(tree, _use_new_zipfile_serialization=rng.random() < 0.8)
        except (pickle.PicklingError, UnicodeError, RuntimeError, NotImplementedError):
            return changed_records(rng, torch_file(make()))

    return change


def changed_safetensors(rng):
    data = described()
    if rng.random() < 0.3:
        return changed_bytes(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if rng.random() < 0.7:
        inside = json.loads(header["__metadata__"]["foldconv"])
        header["__metadata__"]["foldconv"] = text_of(changed_tree(rng, inside, odd_value), small_json)
    if rng.random() < 0.5:
        header = changed_tree(rng, header, odd_value)
    text = text_of(header, small_json).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def changed_config(rng):
    tree = TrainConfig().to_dict() | {"method_args": {"depth_multiplier": 9}, "include": ["a.*", "b"], "base": None}
    tree = {key: value for key, value in tree.items() if value is not None and rng.random() < 0.6}
    if rng.random() < 0.8:
        tree = changed_tree(rng, tree, odd_value)
    data = text_of(tree, rng.choice([yaml.safe_dump, yaml.safe_dump, small_json])).encode("utf-8", "surrogatepass")
    return changed_bytes(rng, data) if rng.random() < 0.4 and data else data


def changed_npz(rng):
    tree, buffer = arrays(), io.BytesIO()
    if rng.random() < 0.6:
        key = rng.choice(list(tree))
        made = [
            lambda a: a.astype(rng.choice(["float32", "int64", "bool", "complex64", "<U5", "S3", "datetime64[s]"])),
            lambda a: a[:0],
            lambda a: a[..., None, None],
            lambda a: np.array(None if rng.random() < 0.5 else Hostile(), dtype=object),
            lambda a: np.zeros(3, dtype=[("a", "i4"), ("b", "O")][: rng.randrange(1, 3)]),
            lambda a: np.zeros((1, 200, 200, 3), "uint8"),
        ]
        tree[key] = rng.choice(made)(tree[key])
        if rng.random() < 0.3:
            del tree[rng.choice(list(tree))]
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(buffer, **tree)
    data = buffer.getvalue()
    if rng.random() < 0.3:  # a shape in a header that the values do not fill
        records = records_of(data)
        name = rng.choice(list(records))
        shape = rng.choice(
            [b"(99999999999,)", b"(-1, 8, 8)    ", b"(1 << 40,)    ", b"((((((((((((( ", b"('a',)       "]
        )
        records[name] = records[name].replace(b"(6, 8, 8), }  ", shape + b"}").replace(b"(6,), }       ", shape + b"}")
        data = packed(records)
    way = rng.random()
    return changed_bytes(rng, data) if way < 0.3 else changed_records(rng, data) if way < 0.7 else data


def changed_keras(rng):
    data, way = keras_file(), rng.random()
    if way < 0.3:
        return changed_bytes(rng, data)
    records = records_of(data)
    if way < 0.7:
        tree = changed_tree(rng, json.loads(records["config.json"]), odd_value)
        records["config.json"] = text_of(tree, small_json).encode("utf-8", "surrogatepass")
        return packed(records)
    if way < 0.85:
        return changed_records(rng, data)
    records["model.weights.h5"] = changed_bytes(rng, records["model.weights.h5"])
    return packed(records)


def changed_gluon(rng):
    arrays = dict(gluon_arrays())
    if rng.random() < 0.6:
        return changed_bytes(rng, gluon_file(arrays))
    name = rng.choice(list(arrays))
    made = [
        lambda a: a.astype(rng.choice(["float64", "float16", "int8", "uint8", "int32", "bool"])),
        lambda a: a[:0],
        lambda a: a[..., None],
        lambda a: a[rng.choice([0, slice(1), slice(None, None, -1)])],
        lambda a: a * rng.choice([float("nan"), float("inf"), 1e38, -1]),
    ]
    arrays[rng.choice([name, name[:-1], "", name * 1000, name.upper()])] = rng.choice(made)(arrays.pop(name))
    return gluon_file(arrays)


def converted(path):
    foldconv.convert_weights(path, nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))


def loaded(path):
    foldconv.load(path, network())


KINDS = {
    "pth": (changed_torch(original), lambda path: foldconv.import_checkpoint(path, network(), source="do-conv")),
    "ckpt": (changed_torch(run), open_network),
    "safetensors": (changed_safetensors, loaded),
    "yaml": (changed_config, TrainConfig.load),
    "npz": (changed_npz, read_npz),
    "keras": (changed_keras, converted),
    "params": (changed_gluon, converted),
}
