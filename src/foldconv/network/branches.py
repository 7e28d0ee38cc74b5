"""`branches`: what each branch of each layer contributes to the kernel that the layer folds to.

All layers are linear in evaluation mode, so a layer's kernel K is the sum of its branches' kernels K_b, written in one
window. Inner products are over all taps and channels of a layer; shifts (biases, means of norms) are left out:

    share          ⟨K_b, K⟩ / ⟨K, K⟩             sums to one over a layer's branches; negative for a branch that works
                                                 against the sum
    norm           ‖K_b‖ / ‖K‖                   large norms with small shares: branches that cancel each other
    similarity     ⟨K_a, K_b⟩ / (‖K_a‖ · ‖K_b‖)  1: two branches learned the same kernel, up to a factor

OREPA's authors argue by the last one: without the scale that each branch has, branches degenerate into one (Hu et al.,
CVPR 2022, section 3). DO-Conv's branches are the identity in its D, which gives W, and what D learned beside it; how
far D is from the identity is ``identity_distance`` = ‖D - I‖ / ‖I‖. A DGConv has one branch, learned ``groups`` and
their ``gates``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import expect
from ..errors import UnsupportedError
from .table import align
from .tree import foldable_layers


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of a layer; `similarity` is the mean with the layer's other branches. None: a kernel of zeros."""

    name: str
    share: float | None
    norm: float | None
    similarity: float | None


@dataclasses.dataclass(frozen=True)
class LayerBranches:
    """One layer. `similarities` is the symmetric matrix of its branches; what a method does not have is None.

    `measures` holds what its method measures besides, by name.
    """

    name: str
    method: str
    branches: tuple[Branch, ...]
    similarities: tuple[tuple[float | None, ...], ...]
    identity_distance: float | None = None
    groups: int | None = None
    gates: tuple[float | None, ...] | None = None
    measures: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def similarity(self) -> float | None:
        """Mean over the pairs of branches that both hold something; None without such a pair."""
        return _mean(value for i, row in enumerate(self.similarities) for value in row[:i])


@dataclasses.dataclass(frozen=True)
class BranchReport:
    """What `branches` found; print it for a table."""

    layers: tuple[LayerBranches, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {"layers": [_plain(dataclasses.asdict(layer)) for layer in self.layers]}

    def __str__(self) -> str:
        head = ["layer", "branch", "share", "norm", "similarity"]
        found = [{name: getattr(layer, name) for name in _FACTS} | layer.measures for layer in self.layers]
        facts = [
            name
            for name in dict.fromkeys(key for own in found for key in own)
            if any(name in own and own[name] is not None for own in found)
        ]
        rows = [(*head, *(_FACTS.get(name, name) for name in facts))]
        for layer, measures in zip(self.layers, found):
            for i, b in enumerate(layer.branches):
                own = [_fact(name, measures.get(name)) if i == 0 else "" for name in facts]
                name = (layer.name or "(root)") if i == 0 else ""
                rows.append((name, b.name, *map(_number, (b.share, b.norm, b.similarity)), *own))
        note = "share: of the folded kernel, negative where a branch works against it; norm: relative to its norm; "
        return f"{align(rows)}\n{note}similarity: mean cosine with the layer's other branches"


_FACTS = {"identity_distance": "D - identity", "groups": "groups", "gates": "gates"}


@torch.no_grad()
def branches(network: nn.Module, dtype: torch.dtype = torch.float64) -> BranchReport:
    """Each branch's share of its layer's folded kernel, and how similar the branches are.

    Args:
        network: expanded; nothing in it changes. Norms count by their running statistics, in training mode too.
        dtype: the arithmetic's.

    Returns:
        A `BranchReport` with one entry per foldable layer, in the network's order. A layer without parallel branches
        (an ExpandNet's chain, a DGConv) has one, of share 1.

    Raises:
        UnsupportedError: the network has no foldable layer, or one that has no exact kernel.

    Source: for the similarity Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3; for D's
    distance Cao et al., "DO-Conv", TIP 2022, eq. 5; for the groups Zhang et al., ICCV 2019.

    Example:
        >>> import foldconv
        >>> net = foldconv.expand(nn.Sequential(nn.Conv2d(4, 8, 3)), foldconv.DOConv())
        >>> print(branches(net))
        layer  branch    share   norm  similarity  D - identity
        ─────  ────────  ─────  ─────  ──────────  ────────────
        0      identity  1.000  1.000           -         0.000
               D         0.000  0.000           -
        share: of the folded kernel, negative where a branch works against it; norm: relative to its norm; \
similarity: mean cosine with the layer's other branches
    """
    expect("dtype", dtype, torch.dtype, "a floating point type")
    layers = foldable_layers(network)
    if not layers:
        raise UnsupportedError(
            f"{type(network).__name__} has no foldable layer and so no branches (a folded network has none left); "
            "expected an expanded one, as in last.ckpt of a training run or from foldconv.expand"
        )
    return BranchReport(tuple(_layer(name, layer, dtype) for name, layer in layers.items()))


def _layer(name: str, layer: Any, dtype: torch.dtype) -> LayerBranches:
    kernels = {key: kernel.weight.flatten() for key, kernel in layer.branch_kernels(dtype).items()}
    products = _products(list(kernels.values()))
    # K is the sum of the branches, so its products are sums of theirs; the shares then add up to one by themselves.
    with_whole = [sum(row) for row in products]
    whole = max(sum(with_whole), 0.0)
    norms = [math.sqrt(row[i]) for i, row in enumerate(products)]
    similarities = tuple(
        tuple(_ratio(value, norm * other) for value, other in zip(row, norms)) for row, norm in zip(products, norms)
    )
    found = tuple(
        Branch(
            name=key,
            share=_ratio(with_whole[i], whole),
            norm=_ratio(norms[i], math.sqrt(whole)),
            similarity=_mean(value for j, value in enumerate(similarities[i]) if j != i),
        )
        for i, key in enumerate(kernels)
    )
    measures = {key: _measure(name, key, value) for key, value in layer.measures().items()}
    known: dict[str, Any] = {key: measures.pop(key) for key in _FACTS if key in measures}
    method = layer.method.name if layer.method else ""
    return LayerBranches(name, method, found, similarities, measures=measures, **known)


def _measure(layer: str, key: str, value: Any) -> Any:
    """A number, or numbers as a tuple; None for one that JSON does not have."""
    if isinstance(value, (list, tuple)):
        return tuple(_measure(layer, key, each) for each in value)
    if value is not None and not isinstance(value, (int, float)):
        raise UnsupportedError(
            f"{layer or 'the root'}: its measures() gives {key!r}: expected a number or a list of numbers, received "
            f"{type(value).__name__}"
        )
    return value if value is None or math.isfinite(value) else None


def _products(rows: list[Tensor]) -> list[list[float]]:
    """All inner products of the rows, taken one by one: stacking large kernels would cost more than the products."""
    found = [[0.0] * len(rows) for _ in rows]
    for i, a in enumerate(rows):
        for j, b in enumerate(rows[: i + 1]):
            found[i][j] = found[j][i] = torch.dot(a, b).item()
    return found


def _ratio(above: float, below: float) -> float | None:
    # Infinities and NaN of a network that diverged are no numbers of JSON.
    return above / below if below > 0 and math.isfinite(above) and math.isfinite(below) else None


def _mean(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _plain(value: Any) -> Any:
    """Tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value + 0.0:.3f}"


def _fact(name: str, value: Any) -> str:
    if name == "gates" and value is not None:  # as the zeros and ones that they stand for
        return "".join("-" if gate is None else "0" if gate < 0 else "1" for gate in value) or "-"
    if isinstance(value, tuple):
        return " ".join(_fact("", each) for each in value) or "-"
    return str(value) if isinstance(value, int) else _number(value)
