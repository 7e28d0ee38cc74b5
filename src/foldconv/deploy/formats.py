"""The formats: what writes and runs each, and which convolutions it takes; help and messages are made of this table."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import runpy
from collections.abc import Mapping
from pathlib import Path

from ..errors import UnsupportedError, install, unknown


@dataclasses.dataclass(frozen=True)
class Format:
    """One format of file and what is known of it; `FORMATS` has them all."""

    name: str
    suffix: str
    file: str
    """The runtime's file in this folder; it imports nothing of foldconv, so that it runs in any environment."""
    extra: str | None
    """Of foldconv's extras the one that brings the packages; None: torch alone."""
    packages: tuple[str, ...] = ()
    """What converts and runs, by the name to install."""
    beside: tuple[str, ...] = ()
    """Suffixes of the files that belong to the one that is named."""
    rewritten: tuple[str, ...] = ()
    """Kinds of convolution, and others (portable.py), that become other modules of the same function first."""
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Kinds that the runtime cannot do, and what it does instead."""
    any_batch: bool = True
    """Whether a file can take batches of any size."""
    largest_batch: int | None = None
    """Of those; None: there is no limit. A graph is traced with so many: from fewer than 16 samples on, torch's own
    choice of a convolution's algorithm bounds what ExecuTorch makes of the graph, whatever bound it is given."""
    tolerance: float = 1e-5
    """Largest difference from the network in float64, relative to the output's largest value."""
    runs_on: str = "any"
    alone: bool = False
    """Whether the converter runs in a process of its own, since it may die, or writes to the terminal."""
    apart: str | None = None
    """The converter's package, where it needs another torch than this environment has."""

    int8: str = ""
    """How `quantize` makes it, in a few words; nothing: it cannot."""
    int8_packages: tuple[str, ...] = ()
    """What that needs beside `packages`, of the extra ``quantization``."""
    int8_from_program: bool = False
    """Whether it is made of torch's graph, not of the float file."""

    @property
    def runtime(self) -> Path:
        """The runtime's file of code."""
        return Path(__file__).with_name(self.file)

    def files_beside(self, path: str | os.PathLike[str]) -> list[Path]:
        """Where the files lie that belong to the one of that name, its description among them."""
        described = "describe" in runpy.run_path(str(self.runtime))
        return [Path(path).with_suffix(suffix) for suffix in (*self.beside, *([] if described else [".json"]))]

    @property
    def quantizer(self) -> Path:
        """The file of code that writes it in int8."""
        return Path(__file__).with_name(f"quantize_{self.file}")

    def expect_packages(self) -> None:
        """Refuse to begin where a package is missing.

        Raises:
            ModuleNotFoundError: naming the package and the extra that brings it.
        """
        _expect(self.packages, f"{self.suffix}: {self.name}", self.extra)

    def expect_int8(self) -> None:
        """Refuse to begin to quantize where there is no int8, or a package is missing.

        Raises:
            UnsupportedError: no int8 is written in this format.
            ModuleNotFoundError: naming the package and the extra that brings it.
        """
        if not self.int8:
            some = ", ".join(f"{form.suffix} ({form.name})" for form in FORMATS.values() if form.int8)
            raise UnsupportedError(f"{self.suffix}: {self.name} is not written in int8; expected one of: {some}")
        self.expect_packages()
        _expect(self.int8_packages, f"{self.suffix}: int8 for {self.name}", "quantization")


def _expect(packages: tuple[str, ...], what: str, extra: str | None) -> None:
    for package in packages:
        if importlib.util.find_spec(_IMPORTED.get(package, package)) is None:
            raise ModuleNotFoundError(f"{what} needs {package}; install it: {install(str(extra))}", name=package)


_IMPORTED: dict[str, str] = {}
"""Packages that are imported under another name than they are installed by."""

FORMATS: dict[str, Format] = {
    form.suffix: form
    for form in (
        Format(
            *("ONNX", ".onnx", "onnx.py", "onnx", ("onnx", "onnxscript", "onnxruntime")),
            int8="ONNX Runtime, QDQ, static",
        ),
        Format("torch.export", ".pt2", "torch_export.py", None),
        Format(
            *("ExecuTorch", ".pte", "executorch.py", "executorch", ("executorch",)),
            rewritten=("circular padding", "PReLU of other than four dimensions"),
            refused={"three dimensions": "converts it, and what it wrote fails when it runs"},
            largest_batch=16,  # a file reserves memory for as many, used or not
            int8="PT2E with XNNPACKQuantizer, static",
            int8_from_program=True,
        ),
        Format(
            *("OpenVINO", ".xml", "openvino.py", "openvino", ("openvino",), (".bin",)),
            int8="NNCF, static",
            int8_packages=("nncf",),
        ),
        Format(
            *("Core ML", ".mlpackage", "coreml.py", "coreml", ("coremltools",)),
            rewritten=("circular padding", "PReLU of other than four dimensions"),
            any_batch=False,
            runs_on="darwin",
            alone=True,
        ),
        Format(
            *("ncnn", ".param", "ncnn.py", "ncnn", ("ncnn", "pnnx"), (".bin",)),
            rewritten=("circular padding", "permuted channels"),
            any_batch=False,
            tolerance=1e-4,
            alone=True,
        ),
        Format(
            *("LiteRT", ".tflite", "litert.py", "litert"),
            rewritten=(
                "groups in three dimensions",
                "transposed with padding",
                "transposed with output_padding",
                "transposed with dilation",
            ),
            refused={
                "transposed in three dimensions": "writes a file that does not load",
            },
            any_batch=False,
            alone=True,
            apart="litert-torch",
            int8="ai-edge-quantizer, dynamic",
        ),
    )
}
"""Every format by its suffix."""


def format_of(path: str | os.PathLike[str], format: str | None = None) -> Format:
    """The format that a path, or a name given for it, means.

    Args:
        path: of the file to write or to run.
        format: a suffix with or without its dot, or a name; None: the path's suffix.

    Raises:
        UnsupportedError: for a suffix that no format has, and for a path that does not end in the format's.

    Example:
        >>> format_of("net.onnx").name, format_of("net.xml", "openvino").suffix
        ('ONNX', '.xml')
    """
    suffix = Path(path).suffix
    by_name = {form.name.lower(): form for form in FORMATS.values()} | {s[1:]: form for s, form in FORMATS.items()}
    if format is not None:
        found = by_name.get(str(format).lower().lstrip("."))
        if found is None:
            names = [form.name.lower() for form in FORMATS.values()]
            raise UnsupportedError(f"format: {unknown('format', str(format).lower(), names)}")
        if found.suffix != suffix:
            raise UnsupportedError(
                f"{path}: expected a name that ends in {found.suffix} for {found.name}, received {suffix or 'none'}; "
                "choose such a name"
            )
        return found
    if suffix not in FORMATS:
        named = ", ".join(f"{s} ({form.name})" for s, form in FORMATS.items())
        raise UnsupportedError(f"{path}: no format has the suffix {suffix!r}; expected one of: {named}")
    return FORMATS[suffix]


def described_formats() -> str:
    """The table for people, a line each.

    Example:
        >>> print(described_formats().splitlines()[1])
          .pt2         torch.export  any batch
    """
    lines = []
    for form in FORMATS.values():
        limit = f" up to {form.largest_batch}" if form.largest_batch else ""
        notes = [f"any batch{limit}" if form.any_batch else "a fixed batch"]
        notes += [f"extra {form.extra}"] if form.extra and form.apart is None else []
        notes += ["in an environment of its own"] if form.apart else []
        notes += [f"no {kind}" for kind in form.refused]
        notes += [f"checked on {form.runs_on} only"] if form.runs_on != "any" else []
        lines.append(f"  {form.suffix:<12} {form.name:<13} {', '.join(notes)}")
    return "\n".join(lines)


def described_int8() -> str:
    """The formats that `quantize` writes, a line each.

    Example:
        >>> print(described_int8().splitlines()[0])
          .onnx    ONNX        ONNX Runtime, QDQ, static
    """
    return "\n".join(f"  {form.suffix:<8} {form.name:<11} {form.int8}" for form in FORMATS.values() if form.int8)
