"""What runs in a process of its own: one function of a runtime's file, on arrays from a file.

``python _child.py RUNTIME.py run MODEL INPUTS.npz OUTPUTS.npz``, ``... RUNTIME.py convert PROGRAM.pt2 TARGET``,
``... QUANTIZER.py quantize SOURCE TARGET INPUTS.npz SETTINGS.json`` or ``... RUNTIME.py measure BEFORE AFTER INPUTS.npz
OUTPUTS.npz THREADS``. It imports nothing of foldconv, so that it starts in an environment that has only the runtime.
"""

import json
import runpy
import sys
import time

import numpy as np

_PAIRS = 31
_ENOUGH = 10.0
"""Seconds after which no more pairs are run, if there are five."""


def main(runtime: str, function: str, *arguments: str) -> None:
    """Call it; batches of arrays come and go as ``batch/index``."""
    functions = runpy.run_path(runtime)
    if function == "convert":
        import torch

        source, target = arguments
        functions["convert"](torch.export.load(source), target)
    elif function == "run":
        model, given, result = arguments
        outputs = functions["run"](model, _read(given))
        np.savez(result, **_named(outputs))
    elif function == "quantize":
        source, target, given, place = arguments
        with open(place, encoding="utf-8") as file:
            settings = json.load(file)
        batches = _read(given)
        functions["quantize"](source, target, batches, settings)
        settings["int8"] = functions["int8_layers"](source, target, settings)
        settings["notes"] = functions["notes"](target, batches) if "notes" in functions else []
        with open(place, "w", encoding="utf-8") as file:
            json.dump(settings, file)
    elif function != "measure":
        raise ValueError(f"expected convert, run, quantize or measure, received {function}")
    else:
        *models, given, result, threads = arguments
        batches = _read(given)
        both = [functions["load"](model, int(threads)) for model in models]
        outputs = [call(batch) for call in both for batch in batches]
        np.savez(result, seconds=_seconds(both, [array[:1] for array in batches[0]]), **_named(outputs))


def _seconds(calls: list, sample: list) -> np.ndarray:
    """Medians of a call's seconds on the clock and of the process, ``(calls, 2)``; one of each in turn."""
    pairs: list[list[tuple[float, float]]] = []
    begin = time.perf_counter()
    while len(pairs) < _PAIRS + 2 and (len(pairs) < 7 or time.perf_counter() - begin < _ENOUGH):
        pairs.append([])
        for call in calls:
            wall, cpu = time.perf_counter(), time.process_time()
            call(sample)
            pairs[-1].append((time.perf_counter() - wall, time.process_time() - cpu))
    return np.median(pairs[2:], axis=0)  # the first calls reserve memory


def _read(path: str) -> list:
    batches: dict[int, list[np.ndarray]] = {}
    with np.load(path) as file:
        for name in file.files:
            batches.setdefault(int(name.split("/")[0]), []).append(file[name])
    return list(batches.values())


def _named(outputs: list) -> dict:
    return {f"{i}/{j}": array for i, batch in enumerate(outputs) for j, array in enumerate(batch)}


if __name__ == "__main__":
    main(*sys.argv[1:])
