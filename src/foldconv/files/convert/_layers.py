"""What the frameworks have in common: layers with arrays in torch's names and layouts, and how one becomes another.

Nothing here knows a framework; `_torch`, `_keras` and `_gluon` read and write them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from ... import formulas
from ...errors import CheckpointError, UnsupportedError, shown

Kind = Literal["conv", "transposed", "kernel", "dense", "norm", "affine"]
"""``kernel``: a convolution, transposed or not, in a file that does not tell; ``affine``: a norm without statistics."""

DEFAULT_EPS = {"torch": 1e-5, "keras": 1e-3, "gluon": 1e-5}
KERNELS = ("conv", "transposed", "kernel")


@dataclasses.dataclass
class Layer:
    """One layer with its arrays.

    Attributes:
        name: in its own framework.
        kind: see `Kind`.
        arrays: of a kernel ``weight``, ``bias``, ``D``, ``weight_extra``; of a dense layer ``weight``, ``bias``; of a
            norm ``weight``, ``bias``, ``running_mean``, ``running_var``; in torch's layouts, absent where it has none.
        eps: of a norm, where it is known.
        groups: of a convolution, where they are known.
        norm: of a kernel, the name of the norm that takes its output, where that is known.
        rows: of what reads a flattened map in channels_last, the map's shape ``(*spatial, channels)``; ``"unknown"``
            where nothing tells.
        track: layers of one track are in the order of the network; nothing is known across tracks.
    """

    name: str
    kind: Kind
    arrays: dict[str, np.ndarray]
    eps: float | None = None
    groups: int | None = None
    norm: str | None = None
    rows: tuple[int, ...] | Literal["unknown"] | None = None
    track: str = ""

    def __post_init__(self) -> None:
        shapes = {role: array.shape for role, array in self.arrays.items()}
        D, weight = shapes.get("D"), shapes.get("weight", ())
        good = True
        if self.kind == "norm":
            good = all(len(shape) == 1 and shape == shapes["running_mean"] for shape in shapes.values())
        elif D is not None:
            taps = math.prod(weight[2:])
            extra = shapes.get("weight_extra", (*weight[:2], 0))
            good = len(D) == 3 and 0 < taps == D[1] <= D[2] and extra == (*weight[:2], D[2] - taps)
            good = good and D[0] > 0 and 0 in (D[0] % weight[0], D[0] % weight[1])
        if not good:
            raise CheckpointError(f"{shown(self.name)[1:-1]}: a {self.kind} cannot have arrays of the shapes {shapes}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight; of a norm, of its statistics."""
        first = self.arrays["running_mean"] if self.kind == "norm" else next(iter(self.arrays.values()))
        return self.arrays.get("weight", first).shape

    @property
    def signature(self) -> tuple[Any, ...]:
        """Layers that can stand for each other have equal ones."""
        kind = "conv" if self.kind == "kernel" else self.kind
        return (kind, *self.shape)

    def __str__(self) -> str:
        return f"{self.name} ({self.kind} {'×'.join(map(str, self.shape))})"


Values = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass
class Network:
    """The layers of a checkpoint or model.

    Attributes:
        where: path or class, for messages.
        framework: ``"torch"``, ``"keras"`` or ``"gluon"``.
        layers: in the order of the network, as far as their tracks tell.
        write: puts new arrays, by layer and array, in torch's layouts, into the model or into a file of that path.
    """

    where: str
    framework: str
    layers: list[Layer]
    write: Callable[[Values, str | None], None]


class _NumPy:
    """`foldconv.formulas.Primitives` of NumPy."""

    matmul = staticmethod(np.matmul)

    @staticmethod
    def first_taps(x: Any, taps: int) -> Any:
        return x[:, :, :taps]


def folded(layer: Layer) -> np.ndarray:
    """The composed kernel of a DO-Conv in float64, in the shape of ``weight``; of a plain layer that itself.

    >>> folded(Layer("a", "conv", {"weight": np.ones((8, 2, 3, 3)), "D": np.zeros((4, 9, 9))})).shape
    (8, 2, 3, 3)
    """
    weight = layer.arrays["weight"].astype(np.float64)
    D = layer.arrays.get("D")
    if D is None:
        return weight
    W = _taps(layer).astype(np.float64)
    taps, multiplier = D.shape[1:]
    if layer.kind == "transposed":  # (in, out/g, S): a product per input channel
        forms, channels, groups = (0, 1, 3, 2), 1, len(D)
        W = W[:, None].reshape(groups, 1, -1, multiplier).transpose(0, 1, 3, 2)
    else:
        channels = W.shape[1]
        groups, forms = len(D) // channels, (0, 3, 1, 2)
        W = W.reshape(groups, -1, channels, multiplier).transpose(0, 2, 3, 1)
    D = D.astype(np.float64).reshape(groups, channels, taps, multiplier)
    return formulas.doconv(W, D, taps, _NumPy()).transpose(forms).reshape(weight.shape)


def _taps(layer: Layer) -> np.ndarray:
    flat = layer.arrays["weight"].reshape(*layer.arrays["weight"].shape[:2], -1)
    extra = layer.arrays.get("weight_extra")
    return flat if extra is None else np.concatenate([flat, extra], axis=2)


def converted(source: Layer, target: Layer, eps: tuple[float, float], notes: list[str]) -> dict[str, np.ndarray]:
    """What `target` has to hold to compute what `source` computes in evaluation mode.

    Args:
        source: with its values.
        target: says which arrays there are; the values of its surplus taps stay, as D ignores them.
        eps: of source and target, for norms.
        notes: gets a line for each thing that a reader may want to know.

    Returns:
        An array for each of the target's, of its shape, in float64 where it was computed.

    Raises:
        UnsupportedError: when nothing the target can hold computes the same.
    """
    wanted = target.arrays
    if source.kind == "norm":
        return _norm(source, target, eps)
    if source.kind == "affine" and eps[0] != eps[1]:
        raise UnsupportedError(
            f"{source.name} → {target.name}: a norm without running statistics with eps {eps[0]:g} cannot be had with "
            f"{eps[1]:g}; give the target's layer the source's, or say what they are (source_eps, target_eps)"
        )
    neutral = {"weight": np.ones, "bias": np.zeros} if source.kind == "affine" else {"bias": np.zeros}
    found = {}
    for name in ("weight", "bias"):
        value = source.arrays.get(name)
        if name in wanted:
            found[name] = neutral[name](wanted[name].shape) if value is None else value
        elif value is not None and np.any(value != neutral[name](value.shape)):
            raise UnsupportedError(
                f"{source.name} → {target.name}: the source has a {name} that is not trivial, the target has none; "
                f"make the target with a {name}"
            )
    if "D" in source.arrays or "D" in wanted:
        found |= _depthwise(source, target, notes)
    return found


def _depthwise(source: Layer, target: Layer, notes: list[str]) -> dict[str, np.ndarray]:
    """``weight``, ``D`` and ``weight_extra`` of the target."""
    wanted, D = target.arrays, source.arrays.get("D")
    if "D" not in wanted:
        notes.append(f"{source.name} → {target.name}: folded, since the target is a plain convolution")
        return {"weight": folded(source)}
    room = wanted["D"].shape[2]
    found = {"weight": source.arrays["weight"], "D": np.zeros(wanted["D"].shape)}
    if "weight_extra" in wanted:
        found["weight_extra"] = wanted["weight_extra"].copy()
    if D is None:
        return found
    if D.shape[2] > room:
        notes.append(f"{source.name} → {target.name}: folded, D is zero: it has {D.shape[2]} taps, the target {room}")
        return found | {"weight": folded(source)}
    found["D"][:, :, : D.shape[2]] = D
    if "weight_extra" in source.arrays:
        extra = source.arrays["weight_extra"]
        found["weight_extra"][:, :, : extra.shape[2]] = extra
    return found


def _norm(source: Layer, target: Layer, eps: tuple[float, float]) -> dict[str, np.ndarray]:
    """Scale and shift are kept: ``γ' = γ √((σ² + ε') / (σ² + ε))``; what the target lacks moves into its statistics."""
    wanted = target.arrays
    values = {name: value.astype(np.float64) for name, value in source.arrays.items()}
    mean, variance = values["running_mean"], values["running_var"]
    gamma, beta = values.get("weight", np.ones_like(mean)), values.get("bias", np.zeros_like(mean))
    deviation = np.sqrt(variance + eps[0])
    if "weight" in wanted:
        gamma_target = gamma if eps[0] == eps[1] else gamma * np.sqrt(variance + eps[1]) / deviation
    else:
        gamma_target = np.ones_like(mean)
        if eps[0] != eps[1] or np.any(gamma != 1):
            with np.errstate(divide="ignore"):
                variance = np.where(gamma > 0, (deviation / gamma) ** 2 - eps[1], -1.0)
    if np.any(variance < 0):
        raise UnsupportedError(
            f"{source.name} → {target.name}: the target's norm has no scale (gamma), and no variance makes up for it "
            f"in {int((variance < 0).sum())} of {len(variance)} channels; make the target with a scale"
        )
    if "bias" not in wanted and np.any(beta != 0):
        scale = gamma / deviation
        if np.any((scale == 0) & (beta != 0)):
            raise UnsupportedError(
                f"{source.name} → {target.name}: the target's norm has no shift (beta), and where the source's scale "
                "is zero no mean makes up for it; make the target with a shift"
            )
        mean = mean - np.divide(beta, scale, out=np.zeros_like(beta), where=scale != 0)
    found = {"running_mean": mean, "running_var": variance, "weight": gamma_target, "bias": beta}
    return {name: value for name, value in found.items() if name in wanted}


def reordered(array: np.ndarray, rows: Any, to_torch: bool) -> np.ndarray:
    """The last axis, of what was flattened in channels_last, in torch's order (channels first), or back.

    >>> reordered(np.arange(4)[None], (2, 2), to_torch=True)
    array([[0, 2, 1, 3]])
    """
    if rows is None or len(rows) < 2:
        return array
    shape = tuple(rows) if to_torch else (rows[-1], *rows[:-1])
    split = array.reshape(*array.shape[:-1], *shape)
    first = array.ndim - 1
    return (np.moveaxis(split, -1, first) if to_torch else np.moveaxis(split, first, -1)).reshape(array.shape)


def fitted(value: np.ndarray, like: np.ndarray, name: str) -> np.ndarray:
    """In the shape's dtype, checked: what is finite stays finite.

    Raises:
        UnsupportedError: for a value beyond the range of the target's dtype.
    """
    if value.shape != like.shape:
        raise CheckpointError(f"{name}: expected shape {like.shape}, received {value.shape}")
    with np.errstate(over="ignore"):
        cast = value.astype(like.dtype)
    lost = int(np.sum(np.isfinite(value) & ~np.isfinite(cast)))
    if lost:
        raise UnsupportedError(
            f"{name}: {lost} of {value.size} values are beyond {like.dtype}; use a target in float32"
        )
    return cast


def follow_in_order(layers: Iterable[Layer]) -> None:
    """Give kernels the norm that directly follows them in the list, where no other reading is near."""
    layers = list(layers)
    for i, layer in enumerate(layers[:-1]):
        following = layers[i + 1]
        after = layers[i + 2].kind if i + 2 < len(layers) else ""
        if layer.kind in KERNELS and following.kind == "norm" and after != "norm":
            grouped = layer.kind != "conv"  # the outputs of a transposed one are known per group
            channels = following.shape[0]
            if layer.shape[0] == channels or (grouped and channels % layer.shape[1] == 0):
                layer.norm = following.name


def channels(layer: Layer, groups: int) -> tuple[int, int]:
    """Input and output channels."""
    first, second = layer.shape[:2]
    return (first, second * groups) if layer.kind == "transposed" else (second * groups, first)


def eps_of(layer: Layer, framework: str, given: float | None, option: str) -> float:
    """A norm's eps: its own where it is known, else what was given, else the framework's default.

    Raises:
        UnsupportedError: when what was given contradicts the layer.
    """
    if layer.eps is None:
        return DEFAULT_EPS[framework] if given is None else given
    if given is not None and not math.isclose(given, layer.eps, rel_tol=1e-6):
        raise UnsupportedError(f"{layer.name}: its eps is {layer.eps:g}, {option} says {given:g}; leave {option} out")
    return layer.eps


def by_name(layers: Iterable[Layer]) -> Mapping[str, Layer]:
    """The layers by their names."""
    return {layer.name: layer for layer in layers}
