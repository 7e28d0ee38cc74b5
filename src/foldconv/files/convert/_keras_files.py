"""Keras' files, without Keras: ``.weights.h5`` and ``.keras``, a zip of a config and such a file.

A layer's variables are in ``<path>/vars`` under their numbers, for DO-Conv also under their names; its path is made of
the classes' names: ``layers/conv2d_1``, ``layers/sequential/layers/dense``. The attribute ``name`` of ``vars`` is the
layer's own name, where Keras is new enough.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from typing import Any

import numpy as np

from ...errors import CheckpointError, UnsupportedError, install
from ..archives import check_archive, is_archive
from ..atomic import atomic_path
from ._keras import KNOWN, Slot, network
from ._keras_graph import Graph, snake_case
from ._layers import Network

_WEIGHTS = "model.weights.h5"
_LONG = 1000
_PLENTY = 1 << 26
_CLASSES = {snake_case(name): name for name in KNOWN}


def read_file(path: str) -> Network:
    """The layers of a ``.keras`` or ``.weights.h5`` file; written as either, a ``.keras`` from a ``.keras`` only.

    Weights in bfloat16 are read as float32, and written as bfloat16.

    Raises:
        CheckpointError: for a file that is missing, damaged or of another kind.
        UnsupportedError: for layers that no rule converts.
    """
    try:
        return _read(path)
    except (CheckpointError, UnsupportedError) as error:  # names in a file may be of any length
        text = str(error) if str(error).startswith(path) else f"{path}: {error}"
        raise type(error)(text if len(text) <= _LONG else f"{text[: _LONG - 4]} ...") from None
    except Exception as error:  # what a config or HDF5 file that lies may raise is no short list
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(f"{path}: not a whole Keras file ({reason}); save it again with Keras 3") from error


def _read(path: str) -> Network:
    archive: dict[str, bytes] = {}
    if is_archive(path):
        check_archive(path, compressed=True)
        with zipfile.ZipFile(path) as zipped:
            archive = {name: zipped.read(name) for name in zipped.namelist()}
        for name in ("config.json", _WEIGHTS):
            if name not in archive:
                raise CheckpointError(f"{path}: not a whole .keras file (no {name} in it); save it again with Keras 3")
        config, content = json.loads(archive["config.json"]), archive[_WEIGHTS]
    else:
        with open(path, "rb") as file:
            config, content = None, file.read()
    groups = _read_h5(content, path)
    graph = Graph.of(config) if config is not None else None
    slots = _slots_of_graph(groups, graph, path) if graph is not None else _slots_of_paths(groups, path)
    where = {slot.name: group for slot, group in slots}

    def write(changed: dict[str, dict[str, np.ndarray]], out: str | None) -> None:
        assert out is not None, "a file is no model"
        weights = _changed_h5(content, {where[name]: values for name, values in changed.items()})
        if out.endswith(".weights.h5"):
            with atomic_path(out, overwrite=False) as temporary:
                temporary.write_bytes(weights)
        elif out.endswith(".keras") and archive:
            with atomic_path(out, overwrite=False) as temporary:
                with zipfile.ZipFile(temporary, "w") as zipped:
                    for name, data in {**archive, _WEIGHTS: weights}.items():
                        zipped.writestr(name, data)
        else:
            expected = ".keras or .weights.h5" if archive else ".weights.h5 (a .keras file needs one as template)"
            raise CheckpointError(f"{out}: expected a name ending in {expected}")

    return network(path, [slot for slot, _ in slots], graph, write)


def _h5py() -> Any:
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UnsupportedError(f"reading Keras files needs h5py; install it: {install('keras')}") from None
    return h5py


def _read_h5(content: bytes, path: str) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    """The variables by their layer's path, with the layer's name or an empty string; optimizers left out."""
    h5py = _h5py()
    found: dict[str, tuple[str, dict[str, np.ndarray]]] = {}

    allowed = max(_PLENTY, 100 * len(content))

    def array(name: str, group: Any, key: str) -> np.ndarray:
        nonlocal allowed
        linked = isinstance(group.get(key, getlink=True), h5py.HardLink)
        data: Any = group[key] if linked else None
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
            raise CheckpointError(f"{path}: {name}/{key}: expected an array in this file, received a link or a group")
        allowed -= data.size * data.dtype.itemsize
        if allowed < 0:
            raise CheckpointError(f"{path}: {name}/{key}: shape {data.shape} is far more than the file holds; damaged")
        if _is_bfloat16(data):
            return (np.asarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if data.dtype.kind != "f":
            kind = data.attrs.get("dtype", data.dtype)
            raise CheckpointError(
                f"{path}: {name}/{key}: expected float16, float32, float64 or bfloat16, received {kind}; save the "
                "model before it is quantized"
            )
        return np.asarray(data)

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Group) and name.endswith("/vars") and not name.startswith("optimizer"):
            owner = name.removesuffix("/vars")
            if not owner.endswith("seed_generator"):
                ordered = sorted(item, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else key))
                if ordered:
                    found[owner] = str(item.attrs.get("name", "")), {key: array(name, item, key) for key in ordered}

    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            if "model_weights" in file or "layer_names" in file.attrs:
                raise CheckpointError(
                    f"{path}: Keras' legacy HDF5 format; load it in Keras and save it as .keras or .weights.h5"
                )
            file.visititems(visit)
    except OSError as error:
        raise CheckpointError(f"{path}: not a readable HDF5 file ({error}); is it whole?") from None
    if not found:
        raise CheckpointError(f"{path}: expected layers with weights, found none; is it a .keras or .weights.h5 file?")
    return found


def _is_bfloat16(data: Any) -> bool:
    return data.dtype == np.dtype("V2") and data.attrs.get("dtype") == "bfloat16"


def _bfloat16(value: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, of two equally near ones the even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def _slots_of_graph(groups: dict[str, Any], graph: Graph, path: str) -> list[tuple[Slot, str]]:
    slots, left = [], dict(groups)
    for where, name, described in graph.layers:
        if where not in left:
            continue
        cls = described["class_name"]
        variables = left.pop(where)[1]
        if cls not in KNOWN:
            raise _no_rule(path, name, cls)
        slots.append((Slot(name, cls, described["config"], variables), where))
    if left:
        where, (called, _) = next(iter(left.items()))
        raise _no_rule(path, called or where, where.rpartition("/")[2])
    return slots


def _slots_of_paths(groups: dict[str, Any], path: str) -> list[tuple[Slot, str]]:
    """Without a config a path tells the class, and the order among the layers of one class."""
    slots = []
    names = [called for called, _ in groups.values()]
    for where in sorted(groups, key=_natural):
        called, variables = groups[where]
        parent, _, last = where.rpartition("/")
        cls = _CLASSES.get(re.sub(r"_\d+$", "", last))
        if cls is None:
            raise _no_rule(path, called or where, last)
        name = called if called and names.count(called) == 1 else where.removeprefix("layers/")
        slots.append((Slot(name, cls, None, variables, track=f"{parent}/{cls}"), where))
    return slots


def _no_rule(path: str, name: str, cls: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: {name}: no rule to convert {cls}; expected convolutions, doconv, dense layers and norms in "
        "Sequential and functional models; give a subclassed model itself, fold layers of other methods first"
    )


def _natural(text: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _changed_h5(content: bytes, changed: dict[str, dict[str, np.ndarray]]) -> bytes:
    """The file with other values; without the optimizer's, which belong to the old ones."""
    buffer = io.BytesIO(content)
    with _h5py().File(buffer, "r+") as file:
        for where, values in changed.items():
            for key, value in values.items():
                data = file[f"{where}/vars/{key}"]
                data[...] = _bfloat16(value).view(data.dtype) if _is_bfloat16(data) else value
        if "optimizer" in file:
            del file["optimizer"]
    return buffer.getvalue()
