"""What runs in a process of its own: one function of a runtime's file, on arrays from a file.

``python _child.py RUNTIME.py run MODEL INPUTS.npz OUTPUTS.npz`` or ``... RUNTIME.py convert PROGRAM.pt2 TARGET``. It
imports nothing of foldconv, so that it starts in an environment that has only the runtime.
"""

import runpy
import sys

import numpy as np


def main(runtime: str, function: str, *arguments: str) -> None:
    """Call it; batches of arrays come and go as ``batch/index``."""
    call = runpy.run_path(runtime)[function]
    if function == "convert":
        import torch

        source, target = arguments
        call(torch.export.load(source), target)
        return
    model, given, result = arguments
    batches: dict[int, list[np.ndarray]] = {}
    with np.load(given) as file:
        for name in file.files:
            batches.setdefault(int(name.split("/")[0]), []).append(file[name])
    outputs = call(model, list(batches.values()))
    arrays = {f"{i}/{j}": array for i, batch in enumerate(outputs) for j, array in enumerate(batch)}
    np.savez(result, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
