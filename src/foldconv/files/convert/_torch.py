"""torch's side: modules, and checkpoints of foldconv or of anybody's ``state_dict``."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import CheckpointError, UnsupportedError
from ...layers import Foldable
from ...network.dataflow import DataFlow
from ...network.fold import fold
from ..atomic import atomic_path
from ..folders import read_content
from ..native import is_described, read_description, save
from ..reading import check_floating, is_safetensors, read_metadata
from ..weights import take
from ._layers import Kind, Layer, Network, Values, fitted, follow_in_order

_KERNEL = {"weight", "bias", "D", "weight_extra"}
_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def read_file(path: str) -> Network:
    """A checkpoint's layers, in its order; written to a file of the same tensors, in the format that its name says."""
    taken = take(read_content(path), path)
    taken.tell()
    tensors = taken.tensors
    check_floating(tensors, path)
    header = read_description(path) if is_described(path) else None
    groups = header.get("groups", {}) if header else {}
    order: Any = (header or {}).get("order")
    told = isinstance(order, list) and set(map(str, order)) == tensors.keys()
    if told:
        tensors = {str(name): tensors[str(name)] for name in order}
    for name, layer in (header or {}).get("layers", {}).items():
        if layer.get("method") != "doconv":
            raise UnsupportedError(
                f"{path}: {name}: only doconv layers convert, found {layer.get('method')!r}; "
                "fold the network first (foldconv fold)"
            )
    layers = _layers(path, tensors, {})
    for layer in layers:
        if layer.kind == "kernel":
            layer.groups = groups.get(layer.name, 1 if header else None)
    if is_safetensors(path) and not told:
        # But for `foldconv.save`'s, their order is the alphabet's, so that names in numbers are all that tells.
        layers.sort(key=lambda layer: _numbers(layer.name))
        for layer in layers:
            layer.track = re.sub(r"\d+", "#", layer.name)
    else:
        follow_in_order(layers)

    def write(values: Values, out: str | None) -> None:
        assert out is not None, "a file is no model"
        _write_file(_changed(tensors, values), out, path)

    return Network(path, "torch", layers, write)


def read_module(model: nn.Module) -> Network:
    """A module's layers; other foldable layers than DO-Conv are folded, in what is read."""
    if any(isinstance(m, Foldable) and not _is_doconv(m) for m in model.modules()):
        keep = [name for name, m in model.named_modules() if _is_doconv(m)]
        if keep:
            raise UnsupportedError(
                f"{type(model).__name__}: holds doconv layers ({keep[0]}, ...) and layers of other methods, of which "
                "only doconv converts; pass foldconv.fold(model)"
            )
        folded = read_module(fold(model))
        folded.write = _refuse_to_write
        return folded
    state = model.state_dict()
    modules = dict(model.named_modules())
    layers = _layers(type(model).__name__, state, modules)
    _attach_norms(model, modules, layers)

    def write(values: Values, out: str | None) -> None:
        changed = _changed(model.state_dict(), values)
        if out is None:
            model.load_state_dict(changed)
            return
        if not str(out).endswith(".safetensors"):
            _write_file(changed, out, None)
            return
        filled = copy.deepcopy(model)
        filled.load_state_dict(changed)
        with atomic_path(out, overwrite=False) as temporary:
            save(filled, temporary)

    return Network(type(model).__name__, "torch", layers, write)


def _refuse_to_write(values: Values, out: str | None) -> None:
    raise UnsupportedError("a target holds foldable layers other than doconv; give its plain network (foldconv.fold)")


def _is_doconv(module: nn.Module) -> bool:
    return getattr(getattr(module, "method", None), "name", None) == "doconv"


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _layers(where: str, tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> list[Layer]:
    """The layers by the names' prefixes; what they are by the module where there is one, else by their arrays."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        name, _, role = key.rpartition(".")
        grouped.setdefault(name, {})[role] = _numpy(tensor)
    layers = []
    for name, arrays in grouped.items():
        module = modules.get(name)
        kind = _kind_of_module(module) if module is not None else _kind_of_arrays(arrays)
        if kind is None:
            what = type(module).__name__ if module is not None else f"a layer with {', '.join(sorted(arrays))}"
            raise UnsupportedError(
                f"{where}: {name or 'the root'}: no rule to convert {what}; expected convolutions, doconv, "
                "linear layers and norms"
            )
        arrays = {role: array for role, array in arrays.items() if role != "num_batches_tracked"}
        layer = Layer(name, kind, arrays)
        if module is not None:
            layer.eps = getattr(module, "eps", None)
            layer.groups = getattr(module, "groups", None)
        layers.append(layer)
    return layers


def _kind_of_module(module: nn.Module) -> Kind | None:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv"
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return "transposed"
    if isinstance(module, nn.Linear):
        return "dense"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "norm" if module.track_running_stats else None
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return "affine"
    return None


def _kind_of_arrays(arrays: dict[str, np.ndarray]) -> Kind | None:
    roles = arrays.keys()
    if {"running_mean", "running_var"} <= roles <= _NORM:
        return "norm"
    if "weight" not in roles or not roles <= _KERNEL:
        return None
    dimensions = arrays["weight"].ndim
    if dimensions >= 3:
        return "kernel"
    if not roles <= {"weight", "bias"} or dimensions == 0:
        return None
    return "dense" if dimensions == 2 else "affine"


def _attach_norms(model: nn.Module, modules: dict[str, nn.Module], layers: list[Layer]) -> None:
    """By data flow where it can be traced, else by order."""
    follow_in_order(layers)
    names = {module: name for name, module in modules.items()}
    try:
        proven = {names[conv]: names[norm] for conv, norm in DataFlow(model).pairs.items()}
    except UnsupportedError:
        proven = {}
    for layer in layers:
        if layer.name in proven:
            layer.norm = proven[layer.name]
        elif layer.norm in proven.values():
            layer.norm = None


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16; float32 holds all of its values.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _changed(tensors: dict[str, Tensor], values: Values) -> dict[str, Tensor]:
    """All tensors, with the new values in the place, dtype and device of the old."""
    changed = dict(tensors)
    for name, arrays in values.items():
        for role, array in arrays.items():
            key = f"{name}.{role}" if name else role
            old = tensors[key]
            cast = torch.from_numpy(fitted(array, _numpy(old), key).copy()).to(old.dtype)
            if bool((torch.isfinite(torch.from_numpy(np.asarray(array))).all()) and not torch.isfinite(cast).all()):
                raise UnsupportedError(f"{key}: values beyond {old.dtype}; use a target in float32")
            changed[key] = cast.to(old.device)
    return changed


def _write_file(tensors: dict[str, Tensor], out: str, template: str | None) -> None:
    suffix = os.path.splitext(out)[1]
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointError(f"{out}: expected a name ending in .safetensors, .pt or .pth for torch's checkpoint")
    with atomic_path(out, overwrite=False) as temporary:
        if suffix == ".safetensors":
            from safetensors.torch import save_file

            metadata = read_metadata(template) if template and is_safetensors(template) else {"format": "pt"}
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, temporary, metadata)
        else:
            with open(temporary, "wb") as file:  # torch hides the reason when it cannot write to a path
                torch.save(tensors, file)
