"""Environments of their own for what does not fit beside this one's torch."""

from __future__ import annotations

import importlib.util
import os
import shutil

from ..errors import UnsupportedError
from .formats import Format

LITERT = ("litert-torch>=0.10", "ai-edge-litert>=2.1", "ai-edge-quantizer>=0.10", "torch<2.15")
"""What LiteRT's environment holds."""
VARIABLE = "FOLDCONV_LITERT_PYTHON"
"""Names the interpreter of such an environment, where there is one already."""


def interpreter(form: Format) -> tuple[str, ...]:
    """The command of the Python that converts and runs a format; empty: this one does.

    Raises:
        UnsupportedError: LiteRT's converter is not in this environment, no other is named, and there is no uv to make
            one.
    """
    if form.apart is None or importlib.util.find_spec(form.apart.replace("-", "_")) is not None:
        return ()
    named = os.environ.get(VARIABLE)
    if named:
        if shutil.which(named) is None:
            raise UnsupportedError(f"{VARIABLE}: expected a Python interpreter, received {named!r}; correct it")
        return (named, "-I")
    uv = shutil.which("uv")
    if uv is None:
        packages = " ".join(f"'{package}'" for package in LITERT)
        raise UnsupportedError(
            f"{form.suffix}: {form.name}'s converter needs an environment of its own: install uv, which makes it, or "
            f"pip install {packages} into one and name its Python in {VARIABLE}"
        )
    wanted = [word for package in LITERT for word in ("--with", package)]
    return (uv, "run", "--quiet", "--no-project", "--isolated", *wanted, "python", "-I")
