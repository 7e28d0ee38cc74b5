"""Write docs/fuzz.md: what foldconv makes of damaged, odd and hostile files.

    python benchmarks/fuzz.py                               10,000 cases, about ten minutes on one core
    python benchmarks/fuzz.py --cases 200 --out table.md    a few seconds

For each kind of file, good ones are made, and changed at random: bits, pieces and lengths of the bytes; records of an
archive, with checksums that are right again; the values in it (types, shapes, names, levels, sizes, aliases). Each case
is read in a process of its own, with limits on time and memory. Reading may succeed or raise an error of foldconv's;
anything else is a fault: another exception, a crash, a hang, too much memory, code of the file's that runs.

The same seed gives the same cases. A fault is printed with its number; ``--only pth --first 17 --cases 1`` repeats it.
"""

import argparse
import collections
import contextlib
import copy
import functools
import io
import itertools
import json
import os
import pickle
import platform
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import torch
import yaml
from torch import nn

import foldconv
from foldconv.lab.data.npz import read_npz
from foldconv.lab.train.building import build
from foldconv.lab.train.checkpoint import open_network
from foldconv.lab.train.config import TrainConfig

OUTCOMES = ("loaded", "our error", "other exception", "hang", "memory", "code run")
FAULTS = OUTCOMES[2:]
SECONDS, BYTES = 20, 2 << 30
LONGEST = 2000  # characters of a message
CODE = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "os.mkdir",
    "os.remove",
    "socket.connect",
)
HEAD = """# Damaged, odd and hostile files

Good files of each kind, changed at random, each read in a process of its own: what came of it. A case may be loaded (a
changed value is a value) or refused by an error of foldconv's in one line; the other columns have to be 0. Written by
`python benchmarks/fuzz.py`, which says how files are changed.

"""

# ---------------------------------------------------------------------- good files


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


# ---------------------------------------------------------------------- changes


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


def packed(records, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


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


def torch_file(tree, **options):
    buffer = io.BytesIO()
    torch.save(tree, buffer, **options)
    return buffer.getvalue()


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

# ---------------------------------------------------------------------- reading


def outcome(read, path):
    """What comes of reading a file in a process of its own, and what was raised."""
    receiver, sender = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if not process:
        _read_in_child(read, path, sender)
    os.close(sender)
    ready, _, _ = select.select([receiver], [], [], 10 * SECONDS)  # a busy machine is no fault of the file's
    if not ready:
        os.kill(process, signal.SIGKILL)
    with open(receiver, "rb") as file:
        said = file.read().decode("utf-8", "replace")
    _, status, usage = os.wait4(process, 0)
    if "code run" in said:
        return "code run", said
    if not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "hang", f"over {SECONDS} seconds"
    if os.WIFSIGNALED(status):
        return "other exception", f"ended by signal {os.WTERMSIG(status)}"
    kind, _, text = said.partition("\n")
    if usage.ru_maxrss * 1024 > _resident() + BYTES // 2:
        return "memory", f"{usage.ru_maxrss >> 10} MiB"
    return kind, text


def _resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read_in_child(read, path, sender):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    warnings.simplefilter("ignore")

    def watch(event, arguments):
        if event in CODE:
            os.write(sender, f"code run: {event} {arguments!r}"[:500].encode())
            os._exit(0)

    sys.addaudithook(watch)
    try:
        read(path)
        said = "loaded\n"
    except (foldconv.FoldConvError, FileNotFoundError) as error:
        good = len(str(error)) <= LONGEST + len(str(path)) and str(error).isprintable()
        said = f"our error\n{error}" if good else f"other exception\na message of {len(str(error))} characters: {error}"
    except MemoryError as error:
        said = f"memory\nMemoryError: {error}"
    except BaseException as error:
        said = f"other exception\n{type(error).__name__}: {error}"
    os.write(sender, said[:4000].encode("utf-8", "replace"))
    os._exit(0)


def drawn(change, seed):
    """A changed file; where a writer refuses the change, the next that is drawn."""
    for attempt in itertools.count():
        with contextlib.suppress(Exception):
            return change(random.Random(f"{seed} {attempt}"))


def count(kinds, first, cases, seed):
    """Outcomes by kind of file; faults are printed."""
    torch.set_num_threads(1)
    counts = {kind: collections.Counter() for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind in kinds:
            path = Path(folder, f"good.{kind}")
            path.write_bytes(GOOD[kind]())
            found, text = outcome(KINDS[kind][1], str(path))
            if found != "loaded":
                raise SystemExit(f"the good {kind} file that the cases are made of: {found}: {text}")
        for number in range(first, first + cases):
            kind = kinds[number % len(kinds)]
            change, read = KINDS[kind]
            torch.manual_seed(number)
            path = Path(folder, f"case.{kind}")
            path.write_bytes(drawn(change, f"{seed} {number} {kind}"))
            found, text = outcome(read, str(path))
            counts[kind][found] += 1
            if found in FAULTS:
                print(f"{kind} {number}: {found}: {' '.join(text.split())[:300]}", flush=True)
        os.chdir("/")
    return counts


def table(counts, seed, seconds):
    """The counts in Markdown."""
    rows = ["| file | cases | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 2) + "|"]
    everything = sum(counts.values(), collections.Counter())
    for kind, found in {**{f"`.{kind}`": counts[kind] for kind in counts}, "all": everything}.items():
        numbers = " | ".join(f"{found[name]:,}" for name in OUTCOMES)
        rows.append(f"| {kind} | {found.total():,} | {numbers} |")
    versions = f"torch {torch.__version__.split('+')[0]}, NumPy {np.__version__}, Python {platform.python_version()}"
    return "\n".join(rows) + f"\n\nSeed {seed}, {versions}, {seconds:.0f} seconds.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many files are read")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other cases")
    parser.add_argument("--only", choices=KINDS, help="one kind of file")
    parser.add_argument("--out", type=Path, help="file to write; default: docs/fuzz.md for all kinds, else none")
    options = parser.parse_args()
    out = options.out.absolute() if options.out else None
    if out is None and options.only is None:
        out = Path(__file__).absolute().parents[1] / "docs" / "fuzz.md"
    start = time.monotonic()
    counts = count([options.only] if options.only else [*KINDS], options.first, options.cases, options.seed)
    text = table(counts, options.seed, time.monotonic() - start)
    print(text)
    if out is not None:
        out.write_text(HEAD + text, encoding="utf-8")
    return int(any(found[name] for found in counts.values() for name in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
