"""`quantize`: fold, equalize, calibrate, write in int8, run what was written, and say what it costs and brings."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import logging
import os
import runpy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._arguments import expect_flags, expect_path
from .._selection import Selection
from ..errors import FoldMismatchError, UnsupportedError
from ..files.atomic import atomic_folder, expect_free
from ..network.table import align
from ..network.tree import expect_module
from .apart import interpreter
from .calibration import Samples, samples_of
from .equalize import equalize as equalized
from .export import deployable, export, read_description, traced, write_description
from .formats import Format, format_of
from .inputs import ByKeyword, as_weights, batch_of, with_tensors
from .portable import portable
from .running import measure_files, quantize_file
from .sensitivity import quantizable_layers, sensitivities

_LOG = logging.getLogger(__name__)
_BATCH = 32
_SENSITIVITY_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote, beside the float file of the same network in the same runtime; print it for a table."""

    path: Path
    format: str
    recipe: str
    """How it was quantized."""
    layers: tuple[str, ...]
    """Convolutions and linear layers, by name."""
    float_layers: tuple[str, ...]
    """Those that the runtime computes in float, as the written file says."""
    kept: tuple[str, ...]
    """Those that were asked to stay in float."""
    equalized: bool
    calibrated: int
    """How many samples the ranges were taken from."""
    judged: int
    """How many samples the accuracies and the error are of."""
    accuracy_before: float | None
    accuracy: float | None
    """Share of right answers in float and in int8; None: there were no labels."""
    error: float
    """Norm of the difference between the outputs in float and in int8, by the norm of the output."""
    size_before: int
    size: int
    """Bytes."""
    latency_before: float
    latency: float
    """Seconds for one sample: medians over calls of the float file and this one in turn."""
    notes: tuple[str, ...] = ()
    """What else a user should know."""
    sensitivities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """With ``auto_keep``, the error of the output when one layer alone is in int8, the largest first."""

    def __str__(self) -> str:
        rows = [("", "float", "int8", "ratio")]
        if self.accuracy is not None:
            rows.append(("accuracy", f"{100 * (self.accuracy_before or 0):.2f} %", f"{100 * self.accuracy:.2f} %", ""))
        rows.append(("output error", "", f"{100 * self.error:.2f} %", ""))
        rows.append(("bytes", f"{self.size_before:,}", f"{self.size:,}", f"{self.size / self.size_before:.2f}"))
        before, after = (f"{1e3 * seconds:.2f} ms" for seconds in (self.latency_before, self.latency))
        rows.append(("one sample", before, after, f"{self.latency / self.latency_before:.2f}"))
        named = [f"{name} (asked)" if name in self.kept else name for name in self.float_layers]
        left = f"; in float: {', '.join(named)}" if named else ""
        return (
            f"{self.path}: {self.format}, {self.recipe}, calibrated with {self.calibrated} samples, judged by "
            f"{self.judged}\n{align(rows)}\n"
            f"{len(self.layers) - len(named)} of {len(self.layers)} layers in int8{left}"
            + "".join(f"\n{note}" for note in self.notes)
        )


def quantize(
    model: nn.Module,
    path: str | os.PathLike[str],
    calibration: Any,
    *,
    evaluation: Any = None,
    format: str | None = None,
    keep_float: str | Iterable[str] = (),
    auto_keep: int = 0,
    equalize: bool = True,
    per_channel: bool = True,
    dynamic_batch: bool = True,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Quantized:
    """Fold a network, write it in int8 in a format that a runtime takes, run that file and compare it with float.

    The network is folded, norms and permutations of channels included, and equalized (`foldconv.equalize`); the ranges
    of its activations are measured on `calibration`. The float file of the same network is written, too, checked as
    `export` does, and removed after both have run in a process of their own.

    Args:
        model: any module, expanded or not; it is not touched.
        path: its suffix is the format.
        calibration: samples as in training: a tensor ``(N, ...)``, a sequence of batches, or a DataLoader. A batch is a
            tensor, a tuple or a dictionary of what the model is called with, or a pair of that and labels, which are
            whole numbers ``(N,)``.
        evaluation: such samples, which the file is judged by; by default those of `calibration`.
        format: the format's name, where it is to be checked against the suffix.
        keep_float: glob patterns on the names of convolutions and linear layers that stay in float.
        auto_keep: so many of the other layers stay, too: those that change the output most when they alone are in int8,
            as measured by simulation in torch on up to 64 samples of `calibration`.
        equalize: whether ranges of channels are made alike first.
        per_channel: whether each output channel of a weight has a scale of its own.
        dynamic_batch: whether the file takes batches of any size, where the format can; else one sample.
        labels: the names of the classes, in the order of the outputs.
        preprocessing: what turns an image into the input, as for `export`.
        overwrite: whether files that are there may be replaced.

    Returns:
        A `Quantized`. Layers that stayed in float are named as the written file, or what the runtime makes of it,
        shows: each runtime leaves some without a word.

    Raises:
        UnsupportedError: a suffix without int8, empty or unequal samples, NaN, labels beyond the classes, a network
            that the converter or the runtime refuses.
        NoMatchError: a pattern of `keep_float` matches no layer.
        FoldMismatchError: the float file does not compute what the network does, or the int8 one gives NaN.
        ModuleNotFoundError: a package is missing; the message names it and foldconv's extra.
        FileExistsError: there is something at `path`, or where a file beside it belongs.

    Source: B. Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only
    inference, CVPR 2018; equalization: M. Nagel et al., ICCV 2019.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     print(quantize(net, Path(folder, "net.onnx"), torch.randn(64, 3, 16, 16), keep_float="0"))
    """
    expect_module(model)
    expect_path(path)
    expect_flags(equalize=equalize, per_channel=per_channel, dynamic_batch=dynamic_batch, overwrite=overwrite)
    form = format_of(path, format)
    if not overwrite:
        expect_free(path, *form.files_beside(path))
    python = interpreter(form)
    form.expect_int8()
    given = samples_of(calibration)
    judges = given if evaluation is None else samples_of(evaluation, "evaluation")
    any_batch = dynamic_batch and form.any_batch
    network, example = with_tensors(model, given.example(2 if any_batch else 1))
    with _named_calibration():
        folded = deployable(network, as_weights(network, example)).float().cpu()
    prefix = "network." if isinstance(folded, ByKeyword) else ""
    names = [name.removeprefix(prefix) for name in quantizable_layers(folded)]
    kept = _asked(keep_float, auto_keep, names, type(model).__name__)
    even = equalize and _equalized(folded, example)
    measured: dict[str, float] = {}
    if auto_keep:
        some = with_tensors(model, given.example(_SENSITIVITY_SAMPLES))[1]
        left = [prefix + name for name in names if name not in kept]
        found = sensitivities(folded, some, per_channel=per_channel, names=left)
        measured = {name.removeprefix(prefix): error for name, error in found.items()}
        kept += list(measured)[:auto_keep]
    size = (form.largest_batch or _BATCH) if any_batch else 1
    with tempfile.TemporaryDirectory() as aside, atomic_folder(path, overwrite=overwrite) as folder:
        plain, target = (Path(place, Path(path).name) for place in (aside, folder))
        with _named_calibration():
            export(
                *(folded, plain, example),
                dynamic_batch=dynamic_batch,
                labels=labels,
                preprocessing=preprocessing,
            )
        ready = portable(folded, form)
        batch = batch_of(example, form.largest_batch or 2) if any_batch else example
        program = traced(ready, batch, any_batch, form.largest_batch)
        inner = [name for name in quantizable_layers(ready) if _outer(name, prefix, names) is not None]
        settings = {
            "layers": inner,
            "keep": [name for name in inner if _outer(name, prefix, names) in kept],
            "calls": _calls(program, inner),
            "weights": _fingerprints(form, ready, inner),
            "per_channel": per_channel,
            "any_batch": any_batch,
            "bound": form.largest_batch and form.largest_batch + 1,
        }
        source = plain
        if form.int8_from_program:
            source = Path(aside, "program.pt2")
            torch.export.save(program, source)
        found, notes = quantize_file(form.quantizer, source, target, given.batches(size), settings, python=python)
        int8 = {_outer(name, prefix, names) for name in found}
        batches = judges.batches(size)
        before, after, seconds = measure_files(form.runtime, plain, target, batches, python=python)
        left = tuple(name for name in names if name not in int8)
        accuracies = _accuracies(judges, before, after)
        result = Quantized(
            path=Path(path),
            format=form.name,
            recipe=f"{form.int8}, {'per channel' if per_channel else 'per tensor'}",
            layers=tuple(names),
            float_layers=left,
            kept=tuple(kept),
            equalized=even,
            calibrated=len(given),
            judged=len(judges),
            accuracy_before=accuracies[0],
            accuracy=accuracies[1],
            error=_error(before, after, path),
            size_before=_size(form, plain),
            size=_size(form, target),
            latency_before=float(seconds[0, 0]),
            latency=float(seconds[1, 0]),
            notes=tuple(notes),
            sensitivities=measured,
        )
        description = read_description(form, plain)
        description["int8"] = {"recipe": result.recipe, "calibrated": len(given), "float_layers": list(left)}
        write_description(form, target, description)
    return result


@contextlib.contextmanager
def _named_calibration() -> Any:
    """What is called an example elsewhere was given as calibration."""
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(str(error).replace("example_inputs:", "calibration:")) from error


def _asked(keep_float: str | Iterable[str], auto_keep: Any, names: list[str], model: str) -> list[str]:
    """The layers that patterns keep in float; refuses what would leave nothing to quantize."""
    if isinstance(auto_keep, bool) or not isinstance(auto_keep, int) or auto_keep < 0:
        raise UnsupportedError(f"auto_keep: expected how many layers stay in float, received {auto_keep!r}")
    patterns = [keep_float] if isinstance(keep_float, str) else list(keep_float)
    Selection(patterns, None).check(names, model)
    kept = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if len(kept) + auto_keep >= len(names):
        raise UnsupportedError(
            f"keep_float, auto_keep: {len(kept)} and {auto_keep} of {len(names)} layers would stay in float, and none "
            "be quantized; export the network instead, or keep fewer"
        )
    return kept


def _equalized(folded: nn.Module, example: Sequence[torch.Tensor]) -> bool:
    """Equalize it where that is possible; whether it was."""
    try:
        equalized(folded, tuple(example), inplace=True)
    except UnsupportedError as error:
        _LOG.warning("not equalized: %s", error)
        return False
    return True


def _outer(name: str, prefix: str, names: list[str]) -> str | None:
    """The user's name of a layer that `portable` may have put into a sequence of its own."""
    name = name.removeprefix(prefix)
    return name if name in names else next((each for each in names if name.startswith(f"{each}.")), None)


def _calls(program: Any, layers: list[str]) -> list[tuple[str, str | None]]:
    """The kind, ``conv`` or ``linear``, of each call of such an operation, and which layer's it is, in order."""
    found = []
    for node in program.graph.nodes:
        name = node.target.__name__ if node.op == "call_function" else ""
        kind = next((kind for kind in ("conv", "linear") if name.startswith(kind)), None)
        if kind:
            stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            found.append((kind, next((path for path in reversed(stack) if path in layers), None)))
    return found


def _fingerprints(form: Format, network: nn.Module, layers: list[str]) -> dict[str, str]:
    """Which layer's a weight is, or a group's part of one, for files that say nothing else."""
    fingerprint = runpy.run_path(str(form.quantizer)).get("fingerprint")
    found: dict[str, str] = {}
    if fingerprint is None:
        return found
    for name in layers:
        layer: Any = network.get_submodule(name)
        weight = layer.weight.detach().numpy()
        for part in (weight, *np.split(weight, getattr(layer, "groups", 1))):
            found.setdefault(fingerprint(part), name)
    return found


def _accuracies(judges: Samples, *outputs: list[list[np.ndarray]]) -> tuple[float | None, ...]:
    """Share of right answers."""
    if judges.labels is None:
        return (None,) * len(outputs)
    found = []
    for each in outputs:
        logits = np.concatenate([batch[0] for batch in each])
        classes = logits.shape[1] if logits.ndim == 2 else 0
        low, high = int(judges.labels.min()), int(judges.labels.max())
        if not classes or low < 0 or high >= classes:
            raise UnsupportedError(
                f"labels: received classes from {low} to {high}, expected those of the output, of shape "
                f"{('N', *logits.shape[1:])}; leave the labels out to judge by the output's error"
            )
        found.append(float((logits.argmax(1) == judges.labels.numpy()).mean()))
    return tuple(found)


def _error(before: list[list[np.ndarray]], after: list[list[np.ndarray]], path: Any) -> float:
    exact, rounded = (
        np.concatenate([array.astype(np.float64).ravel() for batch in each for array in batch])
        for each in (before, after)
    )
    if exact.shape != rounded.shape or not np.isfinite(rounded).all():
        raise FoldMismatchError(
            f"{path}: in int8 the network gives NaN or outputs of other shapes; nothing was left there"
        )
    return float(np.linalg.norm(rounded - exact) / max(np.linalg.norm(exact), 1e-30))


def _size(form: Format, path: Path) -> int:
    """Bytes of a file and those that belong to it."""
    return sum(path.with_suffix(suffix).stat().st_size for suffix in (path.suffix, *form.beside))
