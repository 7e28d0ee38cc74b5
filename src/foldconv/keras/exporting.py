"""`export`: fold a Keras model, write it for deployment, and run what was written before it gets its name."""

# Keras, its backends and the converters are not installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import keras

from .._arguments import expect_path
from ..deploy.formats import FORMATS
from ..deploy.running import furthest, run_file
from ..errors import FoldMismatchError, UnsupportedError, unknown
from ..files.atomic import atomic_folder
from .foldable import FoldableLayer
from .network import check_built, fold

#: Per format and Keras backend: the packages for Keras' exporter and for running what it wrote, by the name they are
#: imported under. What is not listed, Keras cannot do, or not with any torch of today (SavedModel needs torch_xla).
NEEDED: dict[str, dict[str, tuple[str, ...]]] = {
    "tf_saved_model": {"tensorflow": (), "jax": ("tensorflow",)},
    "litert": {"tensorflow": (), "torch": ("litert_torch", "ai_edge_litert")},
    "onnx": {
        "tensorflow": ("tf2onnx", "onnxruntime"),
        "jax": ("jax2onnx", "onnxruntime"),
        "torch": ("onnxscript", "onnxruntime"),
    },
    "torch": {"torch": ()},
}
#: The first Keras with what is younger than the oldest that foldconv takes.
SINCE = {
    ("litert", "tensorflow"): (3, 13),
    ("litert", "torch"): (3, 15),
    ("onnx", "jax"): (3, 14),
    ("torch", "torch"): (3, 15),
}
_SUFFIX = {"litert": ".tflite", "onnx": ".onnx", "torch": ".pt2"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What `export` wrote, and how near it is to the model; print it for one line."""

    path: Path
    format: str
    size: int
    """Bytes, of all files together."""
    max_error: float
    """Largest absolute difference of the outputs of the file and of the model before folding."""
    scale: float
    """Largest absolute value of the model's outputs."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.format}, {self.size:,} bytes, "
            f"within {self.max_error:.1e} of the model, whose outputs reach {self.scale:.1e}"
        )


def export(
    model: Any,
    path: str | os.PathLike[str],
    format: str = "tf_saved_model",
    *,
    inputs: Any = None,
    tolerance: float = 1e-4,
    **options: Any,
) -> Exported:
    """Fold a model, export it with Keras' own exporter, load that again and compare it with the unfolded model.

    Nothing appears under `path` unless the outputs agree.

    Args:
        model: built; it is not touched. One without foldable layers is exported as it is.
        path: of a file, which ends in ``.tflite``, ``.onnx`` or ``.pt2``, or, for a SavedModel, of a folder.
        format: ``"tf_saved_model"`` (Keras on TensorFlow or JAX), ``"litert"`` or ``"tflite"`` (TensorFlow, torch),
            ``"onnx"`` (all three), ``"torch"`` (torch: an ExportedProgram).
        inputs: arrays to compare on, in the structure of the model's inputs; None: two random samples. On torch,
            LiteRT and ExportedProgram take arrays of just this shape, or one sample for None.
        tolerance: largest difference, relative to the largest value of the output; quantization and half precision
            need more.
        options: for Keras' ``model.export``: ``input_signature``, or what the converter takes, such as
            ``optimizations``.

    Raises:
        FoldMismatchError: what was written does not compute what the model does.
        FileExistsError: there is something at `path`.
        ModuleNotFoundError: a converter, or what runs its files, is not installed; the message names the package.
        UnsupportedError: for a format that this Keras on its backend cannot write, a path with another suffix, a
            model that cannot be folded, or one whose input shapes are not known and `inputs` is None; and when a
            converter, or what runs its files, gives up (tf2onnx does on grouped convolutions).

    Example:
        >>> import tempfile
        >>> from foldconv.keras import expand
        >>> rich = expand(keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(8, 3)]))
        >>> if keras.backend.backend() != "torch":  # which writes "onnx", "litert" and "torch" only
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         exported = export(rich, Path(folder, "net"))
        ...     assert exported.max_error < 1e-5 * exported.scale
    """
    check_built(model)
    expect_path(path)
    format = _known(format, Path(path))
    by_torch = keras.backend.backend() == "torch"
    fixed = by_torch and format != "onnx"  # the size of the batch
    if inputs is None:
        inputs = _random(model, options.get("input_signature"), 1 if fixed else 2)
    elif by_torch:
        specs = keras.tree.map_structure(lambda array: _spec(array, array.shape[0] if fixed else None), inputs)
        options.setdefault("input_signature", [specs])
    with _aside(path) as temporary:
        foldable = any(isinstance(layer, FoldableLayer) for layer in model._flatten_layers())
        plain = fold(model) if foldable else model
        expected = _outputs(model, inputs)
        _warn_if_blind(model, inputs, expected, tolerance)
        _outputs(plain, inputs)  # some of Keras' exporters want a model that has been called
        received = _written_and_run(plain, temporary, Path(path).name, format, inputs, options)
        error, scale = _compare(str(path), expected, received, tolerance)
        files = [temporary, *temporary.rglob("*")]
        size = sum(file.stat().st_size for file in files if file.is_file())
    return Exported(Path(path), format, size, error, scale)


def _written_and_run(
    plain: Any, temporary: Path, name: str, format: str, inputs: Any, options: dict[str, Any]
) -> list[np.ndarray]:
    """What the file computes; other libraries' errors in one line of ours."""
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # of what Keras calls; nothing a user could change
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", r"\s*(Warning: )?tf\.lite\.Interpreter is deprecated")
            plain.export(str(temporary), format=format, **{"verbose": False, **options})
            if format == "onnx":
                _into_one_file(temporary)
            return _RUN[format](str(temporary), inputs, _names(plain))
    except (OSError, ImportError, MemoryError, TypeError):
        raise
    except Exception as error:
        why, remedy = " ".join(str(error).split())[:300], "choose another format or backend"
        if "Cannot deserialize computation" in why:
            older = 'TensorFlow is older than this jax, install an older one ("jax<0.12" beside TensorFlow 2.21)'
            remedy = f"{older} or {remedy}"
        raise UnsupportedError(
            f"{name}: this model as {format!r} from Keras on {keras.backend.backend()} cannot be written or run: "
            f"{type(error).__name__}: {why}; not written; {remedy}"
        ) from error


def _known(format: str, path: Path) -> str:
    """The format by its own name, when all is there that it takes."""
    name, backend = {"tflite": "litert"}.get(format, format), keras.backend.backend()
    if name not in NEEDED:
        raise UnsupportedError(unknown("format", format, NEEDED))
    if backend not in NEEDED[name]:
        able = " or ".join(NEEDED[name])
        raise UnsupportedError(
            f"format: {format!r} needs Keras on {able}, received {backend}; save the model as .keras, load it where "
            f"KERAS_BACKEND is {able}, and export it there"
        )
    since = SINCE.get((name, backend), (3,))
    if tuple(int(part) for part in keras.__version__.split(".")[:2]) < since:
        least = ".".join(map(str, since))
        raise UnsupportedError(
            f"format: {format!r} with Keras on {backend} needs Keras {least}, received {keras.__version__}; "
            f'install it: pip install "keras>={least}"'
        )
    for package in NEEDED[name][backend]:
        if importlib.util.find_spec(package) is None:
            install = package.replace("_", "-")
            raise ModuleNotFoundError(
                f"format {format!r} with Keras on {backend} needs {package}; install it: pip install {install}",
                name=package,
            )
    suffix = _SUFFIX.get(name, path.suffix)
    if path.suffix != suffix:
        raise UnsupportedError(f"{path}: expected a name that ends in {suffix} for {format!r}; choose such a name")
    return name


@contextlib.contextmanager
def _aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place to write to, which becomes `path`; what exporters leave beside it does not stay."""
    with atomic_folder(path) as folder:
        temporary = folder / Path(path).name
        yield temporary
        for beside in folder.iterdir():
            if beside != temporary:
                beside.unlink()


def _random(model: Any, signature: Any, batch: int) -> Any:
    """Arrays of the shapes of the model's inputs: normal numbers, or zeros and ones where it takes integers."""
    structure = _input(model) if signature is None else signature
    if signature is not None and len(signature) == 1:
        structure = signature[0]  # one for each argument of the call
    if structure is None:
        raise UnsupportedError(f"{model.name}: the shapes of its inputs are not known; give `inputs`")
    random = np.random.default_rng(0)

    def draw(spec: Any) -> np.ndarray:
        shape = tuple(spec.shape)
        if None in shape[1:]:
            raise UnsupportedError(f"{spec.name}: expected sizes, received the shape {shape}; give `inputs`")
        shape = (shape[0] or batch, *shape[1:])
        dtype = keras.backend.standardize_dtype(spec.dtype)
        drawn = random.normal(size=shape) if "float" in dtype else random.integers(0, 2, shape)
        return drawn.astype(dtype)

    return keras.tree.map_structure(draw, structure)


def _spec(array: Any, batch: int | None) -> Any:
    return keras.layers.InputSpec(shape=(batch, *array.shape[1:]), dtype=keras.backend.standardize_dtype(array.dtype))


def _input(model: Any) -> Any:
    """The symbolic tensors of a model's inputs in their structure; None for a subclassed model."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    return model.input if hasattr(model, "operations") else None


def _names(model: Any) -> list[str]:
    """What the model's inputs are called, in the order of the arrays."""
    return [getattr(tensor, "name", "") for tensor in keras.tree.flatten(_input(model))]


def _outputs(model: Any, inputs: Any) -> list[np.ndarray]:
    return _arrays(model(inputs, training=False))


def _arrays(outputs: Any) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(outputs)]


def _warn_if_blind(model: Any, inputs: Any, expected: list[np.ndarray], tolerance: float) -> None:
    """Say so when the inputs change nothing in the outputs, as in many a network that was never trained."""
    at_zero = _outputs(model, keras.tree.map_structure(np.zeros_like, inputs))
    for ours, zero in zip(expected, at_zero):
        if np.max(np.abs(ours - zero), initial=0) > tolerance * np.max(np.abs(ours), initial=0):
            return
    message = "its outputs are those for zeros, so comparing them shows little; give other `inputs`"
    warnings.warn(f"{model.name}: {message}", stacklevel=3)


def _into_one_file(path: Path) -> None:
    """Take in the weights that an exporter put beside, since the file refers to them by a name that will not stay."""
    if len(list(path.parent.iterdir())) > 1:
        import onnx

        onnx.save_model(onnx.load(path), path, save_as_external_data=False)


def _compare(path: str, expected: list[Any], received: list[Any], tolerance: float) -> tuple[float, float]:
    """Largest difference and largest value of all outputs; each has to agree by its own measure."""
    expected, received = ([np.asarray(array, np.float64) for array in arrays] for arrays in (expected, received))
    error, scale, differs = furthest([expected], [received])
    if differs:
        raise FoldMismatchError(f"{path}: {differs}; not written; please report this")
    if not error <= tolerance:  # so that NaN does not pass
        raise FoldMismatchError(
            f"{path}: what was exported differs from the model: expected at most {tolerance:.1e} of the output's "
            f"largest value, received {error:.1e}; not written; give a larger tolerance for quantization or half "
            "precision"
        )
    largest = (float(np.max(np.abs(x - y), initial=0)) for x, y in zip(expected, received))
    return max(largest, default=0.0), scale


def _run_saved_model(path: str, inputs: Any, names: list[str]) -> list[np.ndarray]:
    import tensorflow as tf

    artefact = tf.saved_model.load(path)  # its function does not keep its variables alive
    return [np.asarray(output) for output in keras.tree.flatten(artefact.serve(inputs))]


def _run_litert(path: str, inputs: Any, names: list[str]) -> list[np.ndarray]:
    if importlib.util.find_spec("ai_edge_litert") is None:
        from tensorflow import lite as interpreter  # the same, on its way out of TensorFlow
    else:
        from ai_edge_litert import interpreter
    run = interpreter.Interpreter(path).get_signature_runner()
    taken = sorted(run.get_input_details(), key=_by_number)
    if set(taken) == set(names):
        taken = names
    found = run(**dict(zip(taken, _arrays(inputs))))
    return [found[name] for name in sorted(found, key=_by_number)]  # output_0, ..., or sorted keys, as Keras flattens


def _by_number(name: str) -> tuple[Any, ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def _run_onnx(path: str, inputs: Any, names: list[str]) -> list[np.ndarray]:
    return run_file(FORMATS[".onnx"].runtime, path, [_arrays(inputs)])[0]


def _run_torch(path: str, inputs: Any, names: list[str]) -> list[np.ndarray]:
    import torch

    return _arrays(torch.export.load(path).module()(keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)))


_RUN = {"tf_saved_model": _run_saved_model, "litert": _run_litert, "onnx": _run_onnx, "torch": _run_torch}
