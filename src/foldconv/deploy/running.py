"""A written file is run by its runtime in a process of its own: a runtime that dies or lies takes nobody with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnsupportedError

_CHILD = Path(__file__).with_name("_child.py")
_UNTOLD = {"CI": "true", "NNCF_CI": "1"}
"""With these, OpenVINO and NNCF tell their maker nothing of what is computed; both do by default."""
_LONGEST = 1800
"""Seconds until a runtime counts as hanging."""


def run_file(
    runtime: Path,
    path: str | os.PathLike[str],
    batches: Sequence[Sequence[np.ndarray]],
    *,
    python: Sequence[str] = (),
) -> list[list[np.ndarray]]:
    """The outputs of a file for each batch of inputs.

    Args:
        runtime: the runtime's file of code, with a function ``run(path, batches)``.
        path: of the file to run.
        batches: the arrays of each call, in the order of the network's inputs.
        python: the command of another interpreter; by default this one.

    Raises:
        UnsupportedError: with the runtime's own reason, when it refuses the file or the inputs, or dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        _save(given, batches)
        call(runtime, "run", str(path), str(given), str(result), python=python)
        with np.load(result) as file:
            return _outputs(file, len(batches))


def measure_files(
    runtime: Path,
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    batches: Sequence[Sequence[np.ndarray]],
    *,
    threads: int = 0,
    python: Sequence[str] = (),
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]], np.ndarray]:
    """The outputs of two files of one runtime for each batch, and how long one sample takes in each.

    Args:
        runtime: the runtime's file of code, with a function ``load(path, threads)``.
        before, after: the files.
        batches: the arrays of each call.
        threads: how many compute; 0: as the runtime thinks best.
        python: the command of another interpreter; by default this one.

    Returns:
        Both outputs, and seconds ``(2, 2)``: of each file, on the clock and of the process; medians over calls of one
        and the other in turn.

    Raises:
        UnsupportedError: as for `run_file`.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        _save(given, batches)
        call(runtime, "measure", *map(str, (before, after, given, result, threads)), python=python)
        with np.load(result) as file:
            both = _outputs(file, 2 * len(batches))
            return both[: len(batches)], both[len(batches) :], file["seconds"]


def quantize_file(
    quantizer: Path,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    batches: Sequence[Sequence[np.ndarray]],
    settings: Mapping[str, Any],
    *,
    python: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Write a file's network in int8.

    Args:
        quantizer: the file of code, with functions ``quantize`` and ``int8_layers``.
        source: a float file, or a program of torch.export.
        target: the file to write.
        batches: the arrays of each call, to calibrate with.
        settings: ``layers``, the names of all; ``keep``, of those that stay in float; ``per_channel``.
        python: the command of another interpreter; by default this one.

    Returns:
        The names of the layers that it computes in int8, and notes for the user.

    Raises:
        UnsupportedError: as for `run_file`.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, place = Path(folder, "inputs.npz"), Path(folder, "settings.json")
        _save(given, batches)
        place.write_text(json.dumps(settings), encoding="utf-8")
        call(quantizer, "quantize", *map(str, (source, target, given, place)), python=python)
        found = json.loads(place.read_text(encoding="utf-8"))
        return found["int8"], found["notes"]


def _save(path: Path, batches: Sequence[Sequence[np.ndarray]]) -> None:
    arrays = {f"{i}/{j}": array for i, batch in enumerate(batches) for j, array in enumerate(batch)}
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]


def _outputs(file: Any, count: int) -> list[list[np.ndarray]]:
    found: list[list[np.ndarray]] = [[] for _ in range(count)]
    for name in file.files:
        number, slash, _ = name.partition("/")
        if slash:
            found[int(number)].append(file[name])
    return found


def call(runtime: Path, function: str, *arguments: str, python: Sequence[str] = ()) -> None:
    """One function of a runtime's file, in a process of its own.

    Raises:
        UnsupportedError: when it fails; with the last line that it wrote, or the signal that ended it.
    """
    # -P: the folder of this package is not searched for imports; its files have the names of their runtimes.
    command = [*(python or (sys.executable, "-P")), str(_CHILD), str(runtime), function, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LONGEST, env={**os.environ, **_UNTOLD}
        )
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"{runtime.stem}: {function} did not end within {_LONGEST // 60} minutes") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise UnsupportedError(f"{runtime.stem}: the process of {function} was killed by {name}")
    if done.returncode:
        # Behind a message from C++ comes where in C++ it was raised.
        lines = [line.strip() for line in done.stderr.splitlines()]
        lines = [line for line in lines if line and not line.startswith(("frame #", "Exception raised from"))]
        raise UnsupportedError(f"{runtime.stem}: {function} failed: {(lines or ['no reason given'])[-1][:500]}")


def furthest(
    expected: Sequence[Sequence[np.ndarray]], received: Sequence[Sequence[np.ndarray]]
) -> tuple[float, float, str]:
    """Largest difference relative to the output it is in, the largest absolute value, and what differs in kind.

    Example:
        >>> furthest([[np.array([0.0, 4.0])]], [[np.array([0.0, 3.0])]])
        (0.25, 4.0, '')
        >>> furthest([[np.zeros(2)]], [[np.zeros(3)]])[2]
        'output 0: expected the shape (2,), received (3,)'
    """
    worst = largest = 0.0
    for ours, theirs in zip(expected, received):
        if len(ours) != len(theirs):
            return np.inf, largest, f"expected {len(ours)} outputs, received {len(theirs)}"
        for i, (left, right) in enumerate(zip(ours, theirs)):
            if left.shape != right.shape:
                return np.inf, largest, f"output {i}: expected the shape {left.shape}, received {right.shape}"
            if left.size:
                # Booleans have no difference, and small whole numbers one that wraps around.
                kind = np.result_type(left.dtype, right.dtype, np.float64)
                left, right = np.asarray(left, kind), np.asarray(right, kind)
                scale, gap = float(np.abs(left).max()), float(np.abs(left - right).max())
                gap = gap / scale if scale else gap
                worst = gap if gap != gap else max(worst, gap)  # max() would hide a NaN behind a number
                largest = max(largest, scale)
    return worst, largest, ""
