"""The authors' own layers as contestants, imported from clones of their repositories; none of their code is here.

=========  ===================  =======================  =====================================================
method     folder of the clone  file                     in the place of
=========  ===================  =======================  =====================================================
doconv     DO-Conv              do_conv_pytorch.py       a convolution: ``DOConv2d``
orepa      OREPA_CVPR2022       blocks.py                a convolution and its norm: ``OREPA_1x1`` for one tap,
                                                         ``OREPA_LargeConv`` from 7 a side, else ``OREPA``
dbb        DiverseBranchBlock   diversebranchblock.py    a convolution and its norm: ``DiverseBranchBlock``
=========  ===================  =======================  =====================================================

The original stands wherever our method would, so that the two differ by the layer alone.
"""

import collections.abc
import contextlib
import copy
import dataclasses
import importlib.util
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from foldconv.algebra.norms import after_norm
from foldconv.errors import UnsupportedError
from foldconv.lab.bench.contestants import Contestant
from foldconv.methods import Method, method_from_json
from foldconv.network.dataflow import DataFlow
from foldconv.network.expand import expand
from foldconv.network.tree import foldable_layers, replace_modules


@dataclasses.dataclass(frozen=True)
class Original:
    """Where the authors keep their layer, and how it is built in the place of a convolution."""

    folder: str
    file: str
    takes_norm: bool
    build: Callable[..., nn.Module]
    """``build(module of the file, convolution)``."""


def _doconv(module: Any, conv: Any) -> nn.Module:
    same = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return module.DOConv2d(bias=conv.bias is not None, **{name: getattr(conv, name) for name in same})


def _orepa(module: Any, conv: Any) -> nn.Module:
    side = conv.kernel_size[0]
    cls = module.OREPA_1x1 if side == 1 else module.OREPA_LargeConv if side >= 7 else module.OREPA
    return cls(conv.in_channels, conv.out_channels, **_square(conv))


def _dbb(module: Any, conv: Any) -> nn.Module:
    return module.DiverseBranchBlock(conv.in_channels, conv.out_channels, **_square(conv))


def _square(conv: Any) -> dict[str, Any]:
    """The geometry as the blocks take it: one number for both dimensions."""
    found = {name: getattr(conv, name)[0] for name in ("kernel_size", "stride", "padding", "dilation")}
    return {**found, "groups": conv.groups}


ORIGINALS = {
    "doconv": Original("DO-Conv", "do_conv_pytorch.py", False, _doconv),
    "orepa": Original("OREPA_CVPR2022", "blocks.py", True, _orepa),
    "dbb": Original("DiverseBranchBlock", "diversebranchblock.py", True, _dbb),
}


def locate(reference: str, methods: list[str]) -> tuple[dict[str, Path], list[str]]:
    """The files of the originals of these methods, and a note for each that is missing.

    Raises:
        UnsupportedError: there is none at all.
    """
    found, notes = {}, []
    for method in dict.fromkeys(methods):
        original = ORIGINALS.get(method)
        if original is None:
            continue
        path = Path(reference, original.folder, original.file)
        if path.is_file():
            found[method] = path
        else:
            where = Path(Path(reference).name, original.folder, original.file)
            notes.append(f"no original of {method}: expected a clone with the file {where}")
    if not found:
        wanted = ", ".join(f"{o.folder}/{o.file} ({name})" for name, o in ORIGINALS.items())
        raise UnsupportedError(f"reference: {reference} holds no original of {', '.join(methods)}; expected {wanted}")
    return found, notes


def contestants(plain: nn.Module, originals: dict[str, Path]) -> list[Contestant]:
    """A contestant per original, with its layers in a copy of the plain network."""
    found = []
    for name, path in originals.items():
        network, layers = swap(plain, method_from_json({"method": name}), path)
        found.append(Contestant(f"{name} (original)", network, layers=layers))
    return found


def swap(plain: nn.Module, method: Method, path: Path) -> tuple[nn.Module, dict[str, int]]:
    """A copy of the network with the original layer wherever `method` would expand; counts by class of layer.

    A convolution that the original cannot take (no norm behind it, sides that differ) stays, counted as its class.

    Args:
        plain: the network.
        method: our config of the same method.
        path: the file of the original, as `locate` finds it.

    Raises:
        UnsupportedError: the file cannot be imported, or builds no layer for a convolution that it should take.
    """
    original, module = ORIGINALS[method.name], _load(path)
    names = list(foldable_layers(expand(plain, method)))
    work = copy.deepcopy(plain)
    pairs = DataFlow(work).pairs if original.takes_norm else {}
    replacements: dict[nn.Module, nn.Module] = {}
    counts: Counter[str] = Counter()
    for name in names:
        conv: Any = work.get_submodule(name)
        norm = pairs.get(conv)
        if original.takes_norm and not (norm is not None and _fits_block(conv)):
            counts[type(conv).__name__] += 1
            continue
        try:
            layer = original.build(module, conv)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise UnsupportedError(f"{path.name}: no layer in the place of {name}, {conv}: {what}") from error
        replacements[conv] = layer.to(conv.weight.device)
        counts[type(layer).__name__] += 1
        if norm is not None:
            replacements[norm] = after_norm(norm)
    return replace_modules(work, replacements), dict(counts)


def _fits_block(conv: Any) -> bool:
    """Do the blocks take it: sides alike, as much padding as keeps the size, zeros?"""
    alike = all(len(set(getattr(conv, name))) == 1 for name in ("kernel_size", "stride", "dilation"))
    padding = tuple(k // 2 for k in conv.kernel_size)
    grouped = conv.groups > 1 and conv.kernel_size[0] == 1
    return alike and not grouped and conv.padding == padding and conv.padding_mode == "zeros"


def commit(path: Path) -> str | None:
    """The commit of the clone that holds this file, or None where git does not tell."""
    try:
        done = subprocess.run(
            ["git", "-C", str(path.parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_original_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UnsupportedError(f"{path}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importing_from(path.parent):
            spec.loader.exec_module(module)
    except Exception as error:
        raise UnsupportedError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from error
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Files of the clone are found as modules inside the block, and are forgotten after it: clones share names.

    DO-Conv's file also imports ``torch._six``, which torch has since dropped; inside the block it is there again.
    """
    siblings = {file.stem for file in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in siblings & sys.modules.keys()}
    six = types.ModuleType("torch._six")
    six.container_abcs = collections.abc  # pyright: ignore[reportAttributeAccessIssue]
    stands_in = sys.modules.setdefault("torch._six", six) is six
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the clone is not ours to write to
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = bytecode
        if stands_in:
            del sys.modules["torch._six"]
        for name in siblings & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(before)
