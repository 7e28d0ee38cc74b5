"""`export`: fold a network, write it in a runtime's format, and run what was written before it gets its name."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._arguments import expect_flags, expect_path
from ..errors import CheckpointError, FoldMismatchError, UnsupportedError, shown
from ..files.atomic import atomic_folder, expect_free, write_json
from ..layers import Foldable
from ..network.fold import fold
from ..network.permute import absorb_permutations
from ..network.tree import copy_of, expect_module
from .apart import interpreter
from .describing import described
from .formats import Format, format_of
from .inputs import batch_of, with_tensors
from .portable import convolutions, kinds_of, portable
from .running import call, furthest, run_file

_LOG = logging.getLogger(__name__)
_NARROW = 1e-5
"""What 32 bits cost most networks, relative; who is further off is asked twice."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export` wrote, and how near it is to the network; print it for one line."""

    path: Path
    format: str
    size: int
    """Bytes, of all files together."""
    error: float | None
    """Largest difference from the folded network in float64, relative to the output's largest value; None: not run."""
    why_unchecked: str = ""

    def __str__(self) -> str:
        checked = (
            f"written, not checked: {self.why_unchecked}"
            if self.error is None
            else f"within {self.error:.1e} of the fold"
        )
        return f"{self.path}: {self.format}, {self.size:,} bytes, {checked}"


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    format: str | None = None,
    dynamic_batch: bool = True,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Fold a network, write it in a format that a runtime takes, run that file and compare.

    The evaluation-mode function is written, whatever mode the model is in: foldable layers and batch norms become plain
    convolutions, permutations of channels move into the layers around them, and what the runtime gets wrong is put in
    other words. Weights of 16 or 64 bits are written in 32. Nothing appears under `path` unless the runtime, in a
    process of its own and in 32 bits, computes what the folded network computes in float64.

    Args:
        model: any module, expanded or not; it is not touched.
        path: its suffix is the format: ``.onnx`` (ONNX), ``.pt2`` (torch.export), ``.pte`` (ExecuTorch), ``.xml``
            (OpenVINO), ``.mlpackage`` (Core ML), ``.param`` (ncnn), ``.tflite`` (LiteRT).
        example_inputs: what the model is called with: a tensor, a tuple of tensors, or a dictionary of them by keyword;
            the first dimension of each is the batch.
        format: the format's name, where it is to be checked against the suffix.
        dynamic_batch: whether the file takes batches of any size, where the format can: ONNX, torch.export, OpenVINO
            and ExecuTorch (up to 16). The others take batches as large as the example, ncnn one sample.
        labels: the names of the classes, in the order of the outputs; written into the description.
        preprocessing: what turns an image into the input, such as mean, std, size and interpolation; plain values.
        check: run the file and compare; without, it is only written.
        overwrite: whether files that are there may be replaced.

    Returns:
        An `Exported`. Beside the file lies its description, ``NAME.json`` (for ONNX it is in the file).

    Raises:
        UnsupportedError: for a suffix that no format has, a convolution that the runtime cannot do (by name), a network
            that the converter cannot write, with its reason, and labels that do not fit the output.
        FoldMismatchError: the file does not compute what the network does; it is removed.
        ModuleNotFoundError: a package is missing; the message names it and foldconv's extra.
        FileExistsError: there is something at `path`, or where a file beside it belongs.

    Example:
        >>> import tempfile
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> rich = foldconv.expand(net, "repvgg")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export(rich, Path(folder, "net.pt2"), torch.randn(2, 3, 8, 8))
        >>> exported.format, exported.error < 1e-5
        ('torch.export', True)
    """
    expect_module(model)
    expect_path(path)
    expect_flags(dynamic_batch=dynamic_batch, check=check, overwrite=overwrite)
    form = format_of(path, format)
    if not overwrite:
        expect_free(path, *form.files_beside(path))
    python = interpreter(form)
    form.expect_packages()
    network, inputs = with_tensors(model, example_inputs)
    folded = _supported(deployable(network, inputs).float().cpu(), form)
    inputs = tuple(x.float().cpu() if x.is_floating_point() else x.cpu() for x in inputs)
    any_batch = dynamic_batch and form.any_batch
    # The first is traced: at a batch of one, a graph holds for no other.
    sizes = (*filter(None, [form.largest_batch]), 3, 1) if any_batch else (len(inputs[0]),)
    batches = [batch_of(inputs, size) for size in sizes]
    expected, own_error = _expected(folded, batches)
    description = described(form, inputs, expected[0], any_batch, labels, preprocessing)
    ready = portable(folded, form)
    with atomic_folder(path, overwrite=overwrite) as folder:
        temporary = folder / Path(path).name
        with _converting(path, form, ready):
            _write(form, traced(ready, batches[0], any_batch, form.largest_batch), temporary, python)
        write_description(form, temporary, description)
        error, why = None, "" if check else "check=False"
        if form.runs_on not in ("any", sys.platform):
            why = why or f"{form.name} runs on {form.runs_on} only"
        elif check:
            received = run_file(form.runtime, temporary, [[x.numpy() for x in b] for b in batches], python=python)
            error, _, differs = furthest(expected, received)
            allowed = form.tolerance + 8 * own_error
            if differs or not error <= allowed:
                differs = differs or f"received {error:.1e} of its largest value"
                raise FoldMismatchError(
                    f"{path}: {form.name} does not compute what the folded network does in float64: expected at most "
                    f"{allowed:.1e}, {differs}; nothing was left there"
                )
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Exported(Path(path), form.name, size, error, why)


def runner(path: str | os.PathLike[str]) -> tuple[Callable[[Sequence[Any]], list[np.ndarray]], dict[str, Any]]:
    """What runs an exported file on samples ``(1, ...)``, one after the other, and the file's description.

    Raises:
        UnsupportedError: the file's runtime refuses it, or its suffix is no format's.
        CheckpointError: there is no description, or none of foldconv's.
        FileNotFoundError: there is no such file.
    """
    form = format_of(path)
    if not Path(path).exists():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    python = interpreter(form)
    form.expect_packages()
    description = read_description(form, Path(path))

    def run(samples: Sequence[Any]) -> list[np.ndarray]:
        # A file for batches of one size gets the sample as often as that.
        size = description["inputs"][0]["shape"][0] or 1
        batches = [[np.repeat(np.asarray(sample), size, 0)] for sample in samples]
        return [outputs[0][:1] for outputs in run_file(form.runtime, path, batches, python=python)]

    return run, description


def deployable(model: nn.Module, inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> nn.Module:
    """The network as a device should get it: folded, norms and permutations absorbed, in evaluation mode.

    Args:
        model: it is not touched.
        inputs: tensors that it is called with, in order or by keyword.
    """
    inputs = inputs if isinstance(inputs, Mapping) else tuple(inputs)
    layers = sum(isinstance(module, Foldable) for module in model.modules())
    folded = absorb_permutations(fold(model, batchnorm=True, example_inputs=inputs), inplace=True)
    folded = (folded if folded is not model else copy_of(model)).eval().requires_grad_(False)
    meta = [name for name, each in (*folded.named_parameters(), *folded.named_buffers()) if each.is_meta]
    if meta:
        raise UnsupportedError(f"{meta[0]}: is on the meta device and has no values; load the weights first")
    left = [name for name, module in folded.named_modules() if isinstance(module, Foldable)]
    if left:
        raise UnsupportedError(f"{left[0]}: is still a foldable layer after folding; please report this network")
    if layers:
        _LOG.info("%d foldable layers were folded", layers)
    return folded


def _outputs(network: nn.Module, batch: Sequence[Tensor]) -> list[np.ndarray]:
    try:
        with torch.no_grad():
            values = tree_leaves(network(*batch))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        remedy = "the first dimension has to be the batch; dynamic_batch=False tries the example's size only"
        raise UnsupportedError(
            f"example_inputs: fails for a batch of {len(batch[0])}: {reason(error)}; {remedy}"
        ) from None
    if not values or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"
        raise UnsupportedError(
            f"the network's output holds {kinds}, expected tensors; wrap it in one that returns its tensors"
        )
    return [value.numpy() for value in values]


def _expected(folded: nn.Module, batches: Sequence[Sequence[Tensor]]) -> tuple[list[list[np.ndarray]], float]:
    """The outputs in float64, and how far torch's own float32 is from them."""
    exact = copy_of(folded).double()
    wide = [[x.double() if x.is_floating_point() else x for x in batch] for batch in batches]
    expected = [_outputs(exact, batch) for batch in wide]
    if not all(np.isfinite(each).all() for batch in expected for each in batch if each.dtype.kind in "fc"):
        raise UnsupportedError("example_inputs: the network's outputs on them hold NaN or infinity; give others")
    own_error = furthest(expected, [_outputs(folded, batch) for batch in batches])[0]
    if own_error > _NARROW and furthest(expected[-1:], [_outputs(exact, wide[-1])])[0] > _NARROW:
        raise UnsupportedError(
            "the network computes something else from the same inputs each time that it is called (random numbers, or "
            "what it counts), so no file can be compared with it; make it the same in evaluation mode"
        )
    return expected, own_error


def _supported(folded: nn.Module, form: Format) -> nn.Module:
    for name, conv in convolutions(folded).items():
        for kind in kinds_of(conv, form):
            if kind in form.refused:
                why = f"{form.name} {form.refused[kind]}"
                raise UnsupportedError(f"{name or 'the root'}: {kind}: {why}; choose another format")
    return folded


@contextlib.contextmanager
def _converting(path: Any, form: Format, network: nn.Module) -> Iterator[None]:
    """A converter's chatter is nobody's; its errors come in one line."""
    levels = {name: logging.getLogger(name).level for name in _CHATTER}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    except (OSError, MemoryError, ImportError, UnsupportedError):
        raise
    except Exception as error:
        why = _where(error, network) + reason(error)
        raise UnsupportedError(f"{path}: {form.name} cannot write this network: {why}") from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _where(error: BaseException, network: nn.Module) -> str:
    """The innermost module of the network in whose forward an error arose; nothing, where none had a part in it."""
    names = {module: name for name, module in network.named_modules()}
    found = ""
    while error.__cause__ is not None:
        error = error.__cause__
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(module):
            found = f"{names[module]} ({type(module).__name__}): "
    return found


def reason(error: BaseException) -> str:
    """The line of an exception, or of what caused it, that tells most."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:400]


_CHATTER = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "openvino", "coremltools", "executorch")


def traced(network: nn.Module, batch: Sequence[Tensor], any_batch: bool, largest: int | None = None) -> Any:
    """The network as one graph of torch's operations; in it any size of batch, or the given one."""
    shapes = None
    if any_batch:
        # One more than is promised: a bound that equals the traced size would be the only size.
        size = torch.export.Dim("batch", max=largest and largest + 1)
        shapes = torch.export.ShapesCollection()
        for value in batch:
            shapes[value] = {0: size}
    with torch.no_grad():
        program = torch.export.export(network, tuple(batch), dynamic_shapes=shapes)
    # torch notes for each operation the lines of source code that led to it, and the paths of their files: not for the
    # device, nor for whoever gets the file.
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)
    return program


def _write(form: Format, program: Any, path: Path, python: Sequence[str]) -> None:
    if form.alone:
        source = path.with_name("program.pt2")
        torch.export.save(program, source)
        call(form.runtime, "convert", str(source), str(path), python=python)
        source.unlink()
    else:
        runpy.run_path(str(form.runtime))["convert"](program, str(path))
    for suffix in (path.suffix, *form.beside):
        if not path.with_suffix(suffix).exists():
            raise RuntimeError(f"the converter ended well and wrote no {path.stem}{suffix}")


def read_description(form: Format, path: Path) -> dict[str, Any]:
    """What `export` said of a file.

    Raises:
        CheckpointError: nothing, or something else.
    """
    functions = runpy.run_path(str(form.runtime))
    try:
        if "description" in functions:
            text = functions["description"](str(path))
        else:
            text = path.with_suffix(".json").read_text(encoding="utf-8")
        found = json.loads(text)
    except Exception as error:  # decoders raise all kinds, for bytes that anybody may have written
        where = path if "description" in functions else path.with_suffix(".json")
        raise CheckpointError(f"{where}: expected a description of what was exported: {reason(error)}") from None
    inputs = found.get("inputs") if isinstance(found, dict) and "foldconv" in found else None
    if not isinstance(inputs, list) or not inputs or not all(_is_described(each) for each in inputs):
        raise CheckpointError(f"{path}: expected a file of foldconv's export, received the description {shown(found)}")
    return found


def _is_described(tensor: Any) -> bool:
    shape = tensor.get("shape") if isinstance(tensor, dict) else None
    sizes = isinstance(shape, list) and all(n is None or (type(n) is int and 0 < n < 2**20) for n in shape)
    return sizes and bool(shape)


def write_description(form: Format, path: Path, description: dict[str, Any]) -> None:
    """Into the file, where the format has a place for it; else beside it."""
    functions = runpy.run_path(str(form.runtime))
    if "describe" in functions:
        functions["describe"](str(path), json.dumps(description))
    else:
        write_json(path.with_suffix(".json"), description)
