"""On what a measurement was made: processor, threads, accelerator, versions; paths as others may see them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchvision", "timm", "numba", "triton", "numpy")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, logical cores that this process may use, torch's threads, and the GPU's name with ``"cuda"``.

    Without torch, or before it is imported, `threads` is None, for the caller to fill in.

    >>> sorted(machine())
    ['cores', 'gpu', 'processor', 'system', 'threads']
    """
    torch = sys.modules.get("torch")  # who measures torch has imported it; who measures another library may lack it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads() if torch else None,
        "gpu": torch.cuda.get_device_name() if torch and device == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Of Python, foldconv and what matters for speed, or `packages`; what is not installed is left out.

    >>> sorted(versions(["no-such-package"]))
    ['foldconv', 'python']
    """
    from .. import __version__

    found = {"python": platform.python_version(), "foldconv": __version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def portable(path: str) -> str:
    """A path as given when relative; of an absolute one only the last name, since the rest is nobody else's business.

    >>> portable("results/a.json"), portable("/home/someone/a.json")
    ('results/a.json', 'a.json')
    """
    return Path(path).name if Path(path).is_absolute() else path


def _processor() -> str:
    """The model's name; Linux tells it in a file, and `platform` elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
