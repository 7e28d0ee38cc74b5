"""`plan`: what `expand` would do with each convolution of a network, and why."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._arguments import expect_flags
from .._selection import UNSELECTED, Patterns, Selection, pick, weigh
from ..algebra.convolutions import PLAIN
from ..errors import UnsupportedError
from ..layers import Foldable
from ..methods import Method, as_method
from ..methods._registry import Init, expect_init
from ._subclasses import as_plain, why_not
from .dataflow import DataFlow
from .table import align
from .tree import changeable, walk

_LOG = logging.getLogger("foldconv")
_DONE = "it is foldable already"


@dataclasses.dataclass(frozen=True)
class Row:
    """One convolution.

    Attributes:
        name: its first qualified name; empty for the root.
        layer: its class.
        taken: does it get a foldable layer?
        norm: the name of the norm that its layer takes in, or None.
        why: why it is left, or empty.
        evidence: where its output goes, as far as it is known and matters to the method; or empty.
    """

    name: str
    layer: str
    taken: bool
    norm: str | None
    why: str
    evidence: str

    def __str__(self) -> str:
        if self.taken:
            return "taken" if self.norm is None else f"taken, with {self.norm}"
        return f"left: {_with(self.why, self.evidence)}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found; print it for a table of every convolution."""

    model: str
    method: str
    rows: tuple[Row, ...]

    @property
    def taken(self) -> list[str]:
        """The names of the convolutions that get foldable layers."""
        return [row.name for row in self.rows if row.taken]

    @property
    def left(self) -> dict[str, str]:
        """The names of the convolutions that stay as they are, each with the reason."""
        return {row.name: row.why for row in self.rows if not row.taken}

    def __str__(self) -> str:
        rows = [("convolution", self.method), *((row.name or "(root)", str(row)) for row in self.rows)]
        return f"{align(rows)}\n{len(self.taken)} of {len(self.rows)} convolutions of {self.model} taken"


def plan(
    model: nn.Module,
    method: str | Method,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    init: Init = "preserve",
    example_inputs: Any = None,
    inplace: bool = False,
) -> Plan:
    """What `foldconv.expand` would do with the same arguments: each convolution, taken or left, and why.

    Args:
        model: any module; nothing in it changes.
        method: a name (``"doconv"``) or a config (``foldconv.DOConv(depth_multiplier=12)``).
        include, exclude, where, example_inputs: as in `expand`.
        init, inplace: taken so that the call may be `expand`'s own; which convolutions are replaced is no matter of
            theirs.

    Returns:
        A `Plan`, with ``rows``, ``taken`` and ``left``; its text is a table. That nothing is taken is no error here.

    Raises:
        NoMatchError: when a pattern matches no convolution.
        UnsupportedError: as `expand`, but for a named convolution that cannot be replaced.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
        >>> print(foldconv.plan(net, "repvgg"))
        convolution  repvgg
        ───────────  ──────────────────────────────────────────────────────────────────
        0            taken, with 1
        2            left: its kernel has one tap, which a 1×1 branch would only repeat
        1 of 2 convolutions of Sequential taken
    """
    expect_init(init)
    expect_flags(inplace=inplace)
    choice = Choice(changeable(model), as_method(method), include, exclude, where, example_inputs)
    if any(reason is None for reason in choice.reasons.values()):
        choice.check_ties({conv: names[0] for conv, names in choice.names.items() if choice.reasons[conv] is None})
    return choice.plan()


class Choice:
    """Which convolutions of a model a method replaces, by the arguments of `expand`.

    Attributes:
        names: each convolution with all its names.
        reasons: why it is left, or None.
        pairs: the norm that each takes in, for methods that do.
        evidence: where the output goes of each that the method itself leaves, if that matters to it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Method,
        include: Patterns,
        exclude: Patterns,
        where: Callable[[str, nn.Module], bool] | None,
        example_inputs: Any,
    ):
        self._model, self._config, self._where = model, config, where
        self._flow = DataFlow(model, example_inputs, training=True, tolerant=not config.takes_norm)
        self.pairs = self._flow.pairs if config.takes_norm else {}
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in walk(model):
            if isinstance(module, (*PLAIN, Foldable)):
                self.names.setdefault(module, []).append(name)
        self.evidence: dict[nn.Module, str] = {}
        self._selection = Selection(include, exclude)
        self.reasons = weigh(self.names, self._selection, self._reason_against, model=type(model).__name__, where=where)

    def chosen(self) -> dict[nn.Module, str]:
        """The convolutions to replace, with their first names.

        Raises:
            NoMatchError, UnsupportedError: as `expand` says.
        """
        reasons = {conv: reason and _with(reason, self.evidence.get(conv, "")) for conv, reason in self.reasons.items()}
        words = {"method": self._config.name, "model": type(self._model).__name__, "foldable": Foldable}
        chosen = pick(
            self.names, reasons, self._selection, **words, kinds="nn.Conv1d ... nn.ConvTranspose3d", where=self._where
        )
        self.check_ties(chosen)
        return chosen

    def plan(self) -> Plan:
        """The choice in words."""
        first = {module: name for name, module in reversed(list(walk(self._model)))}
        rows = []
        for conv, (name, *_) in self.names.items():
            reason = self.reasons[conv]
            norm = first[self.pairs[conv]] if reason is None and conv in self.pairs else None
            rows.append(Row(name, type(conv).__name__, reason is None, norm, reason or "", self.evidence.get(conv, "")))
        return Plan(type(self._model).__name__, self._config.name, tuple(rows))

    def log(self) -> None:
        """One line on the convolutions that nobody left on purpose; a warning, if not only for the method's sake."""
        left = {conv: why for conv, why in self.reasons.items() if why not in (None, UNSELECTED, _DONE)}
        if not left:
            return
        reasons = Counter(left.values()).most_common()
        texts = [f"{count}: {why}" for why, count in reasons[:3]] + ["..."] * (len(reasons) > 3)
        _LOG.log(
            logging.INFO if all(self.evidence.get(conv) == "" for conv in left) else logging.WARNING,
            "expand: %d of %d convolutions of %s stay as they are (%s); print(foldconv.plan(model, %r)) tells of each",
            *(len(left), len(self.names), type(self._model).__name__, "; ".join(texts), self._config.name),
        )

    def _reason_against(self, conv: nn.Module) -> str | None:
        reason = reason_against_any(conv)
        if reason is not None:
            return reason
        reason = self._config.reason_against(as_plain(conv), self.pairs.get(conv))
        if reason is not None:
            self.evidence[conv] = self._evidence(conv)
        elif conv in self._flow.read:
            return "the model or a hook also reads its weight, where the composed kernel would be missing"
        elif conv in self._flow.asked:
            return "the model asks for its exact class, which a foldable layer's is not; ask by isinstance"
        elif self._config.takes_norm and conv in self._flow.asked_as:
            return "the model asks for its class, of which layers of branches are no instances"
        return reason

    def _evidence(self, conv: nn.Module) -> str:
        """Where the output goes of a convolution that a method leaves, perhaps for want of a norm."""
        norm: Any = getattr(nn, f"BatchNorm{len(conv.kernel_size)}d")  # pyright: ignore[reportArgumentType]
        if not self._config.takes_norm or conv in self.pairs:
            return ""
        if self._config.reason_against(as_plain(conv), norm(conv.out_channels, device="meta")) is not None:
            return ""
        unseen = conv in self._flow.unseen and not self._flow.runs
        hint = "; with example_inputs= the model also runs, which shows more than tracing" if unseen else ""
        return f"{self._flow.why(conv)}{hint}"

    def check_ties(self, chosen: dict[nn.Module, str]) -> None:
        """Refuse to replace a convolution whose weight a module holds that stays."""
        replaced = {id(conv.weight): name for conv, name in chosen.items()}
        memory = {_place_of(conv.weight): (conv.weight, name) for conv, name in chosen.items()}
        for name, module in self._model.named_modules():
            for parameter in module._parameters.values():
                other, its = memory.get(_place_of(parameter), (parameter, ""))
                if other is not parameter:
                    raise UnsupportedError(
                        f"{its or 'the root'} has its weight in the memory of another parameter, of "
                        f"{name or 'the root'}, which folding would untie; make it one parameter"
                    )
                if id(parameter) in replaced and module not in chosen:
                    raise UnsupportedError(
                        f"{replaced[id(parameter)]} shares its weight with {name or 'the root'}, which would stay as "
                        "it is; folding would untie them: include both or exclude both"
                    )


def _place_of(parameter: Any) -> tuple[int, Any]:
    """Where in memory a parameter is; itself, where nobody can tell."""
    plain = type(parameter) is nn.Parameter and not parameter.is_meta and parameter.layout == torch.strided
    place = parameter.data_ptr() if plain else 0
    return (place, parameter.shape) if place else (id(parameter), None)


def _with(reason: str, evidence: str) -> str:
    return f"{reason} ({evidence})" if evidence else reason


def reason_against_any(conv: nn.Module) -> str | None:
    """Why no method may replace this convolution."""
    if isinstance(conv, Foldable):
        return _DONE
    weight = conv._parameters.get("weight")
    if isinstance(weight, nn.UninitializedParameter):
        return "it is lazy and has no weight yet; run the model once before expanding it"
    if weight is None:
        return "its weight is computed from something else (weight_norm, spectral_norm or pruning); remove that first"
    reason = why_not(conv)
    if reason is not None:
        return reason
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        return "its forward was replaced on the instance, so it may compute another function"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}; expected a floating point type"
    extra = [*conv._parameters.keys() - {"weight", "bias"}, *conv._buffers, *conv._modules]
    if extra:
        return f"it also holds {', '.join(map(repr, sorted(extra)))}, which a folded convolution has no place for"
    try:
        as_plain(conv)
    except UnsupportedError as error:
        return str(error)
    return None
