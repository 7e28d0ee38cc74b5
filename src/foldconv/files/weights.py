"""`read_weights`: the tensors of anybody's checkpoint by the network's own names; one line says what was taken."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import expect
from ..errors import CheckpointError, shown
from ..network.tree import unwrapped
from .folders import read_content
from .reading import check_plain, kind_of
from .trainers import AVERAGE, COUNTS, INSIDE, LIGHTNING, REMEDY, heads, weights_in

_LOG = logging.getLogger(__name__)
_MODULE = "module."
_COUNT = "num_batches_tracked"
_ALONE = "backbone."
"""A network all of whose names begin so is that backbone and nothing else."""


def read_weights(
    path: str | os.PathLike[str], *, weights: str = "auto", prefix: str | None = None, model: nn.Module | None = None
) -> dict[str, Tensor]:
    """The weights in a checkpoint of the usual trainers, by the network's own names; no code in the file is run.

    Read are files of `torch.save` and safetensors, and folders: torch's distributed checkpoints (FSDP2), Hugging Face's
    in parts, DeepSpeed's. Of several sets of weights the one is taken that the file's trainer validates (an average
    where it keeps one); what compiling, wrapping and trainers put before the names is stripped. The logger ``foldconv``
    says in one line what was taken and stripped.

    Args:
        path: the file or folder.
        weights: the entry to take, such as ``"state_dict"`` or ``"model_ema"``, by its way from the top; ``"auto"``:
            the one that the trainer validates.
        prefix: take the names that begin so, without it, such as ``"model.backbone."``; ``""`` strips nothing but what
            compiling and wrapping put in; None: what all names begin with, where that is no part of a network.
        model: the network that the weights are for: the prefix is then the one that leaves its names, and counts of
            batches that the file lacks are the network's. A compiled or parallel one stands for what is inside.

    Returns:
        Tensors on the CPU, of the file's dtypes, by name.

    Raises:
        CheckpointError: for a file that is missing, unreadable, damaged, would run code, holds no tensors, or several
            sets of weights where nobody can tell which is meant; the message names the option that helps.

    Example:
        >>> import tempfile
        >>> state = {"module._orig_mod.weight": torch.ones(1)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {}, "state_dict_ema": state, "epoch": 3}, f"{folder}/net.pth.tar")
        ...     read_weights(f"{folder}/net.pth.tar")
        {'weight': tensor([1.])}
    """
    if model is not None:
        expect("model", model, nn.Module, "a module")
        model = unwrapped(model)
    taken = take(read_content(path), path, weights=weights, prefix=prefix, network=model)
    taken.tell()
    return taken.tensors


@dataclasses.dataclass(frozen=True)
class Taken:
    """What was taken out of a file, and what was done to the names."""

    path: Any
    tensors: dict[str, Tensor]
    entry: str
    why: str = ""
    others: tuple[str, ...] = ()
    """Other entries with weights."""
    stripped: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    """The file's names that do not begin with what was stripped."""
    names: tuple[str, ...] = ()
    """The file's own names in the entry."""
    several: bool = False
    """Whether the names are those of several networks."""
    filled: int = 0
    """Counts of batches that the file does not have."""

    def line(self) -> str:
        """One line for a user.

        >>> Taken("net.pth", {"a": torch.ones(1)}, "model", stripped=("module.",)).line()
        "net.pth: took 'model' (1 tensor); stripped 'module.'"
        """
        what = f"took {shown(self.entry)}" if self.entry else "took the tensors at its top"
        number = f"{len(self.tensors) - self.filled} tensor{'s' * (len(self.tensors) - self.filled != 1)}"
        parts = [f"{what} ({self.why}; {number})" if self.why else f"{what} ({number})"]
        if self.others:
            parts[0] += f", not {_listed(self.others, 5)}"
        if self.stripped:
            parts.append(f"stripped {_listed(self.stripped, 5)}")
        if self.left:
            parts.append(f"left {len(self.left)} that do not begin so: {_listed(self.left, 3)}")
        if self.several:
            parts.append(f"its names begin with {self._beginnings(5)}; --prefix (prefix=) takes one")
        if self.filled:
            parts.append(f"no {_COUNT} in it ({self.filled} stay as they are)")
        return f"{self.path}: {'; '.join(parts)}"

    def tell(self) -> None:
        """Log the line: a warning where something was left that could have been meant."""
        chosen = self.others or self.left or self.several
        _LOG.log(logging.WARNING if chosen else logging.INFO, "%s", self.line())

    def _beginnings(self, most: int) -> str:
        first = Counter(name.partition(".")[0] + "." * ("." in name) for name in self.names)
        listed = ", ".join(f"{shown(name)} ({count})" for name, count in first.most_common(most))
        return listed + f", ... ({len(first)} beginnings)" * (len(first) > most)

    def hint(self) -> str:
        """The file's own names, and the options that choose among them, for a message."""
        others = f"; other entries: {_listed(self.others, 8)}" if self.others else ""
        return (
            f"its own names begin with {self._beginnings(8)}, such as {_listed(self.names, 2)}{others}; choose among "
            "them with --prefix and --weights (prefix=, weights=), or name another network"
        )


def take(
    content: Any,
    path: Any,
    *,
    weights: str = "auto",
    prefix: str | None = None,
    network: nn.Module | None = None,
    partly: nn.Module | None = None,
) -> Taken:
    """`read_weights` of what was read from `path`, without the line.

    `partly`: a network of which the file has some names only, as a published checkpoint with blocks has.
    """
    expect("weights", weights, str, "the name of an entry, or 'auto'")
    if prefix is not None:
        expect("prefix", prefix, str, "text that names begin with, or None")
    found = weights_in(content, path, weights, network)
    entries: dict[str, Any] = {}
    inside: dict[str, None] = {}
    for name, value in found.content.items():
        if isinstance(name, str):
            inside |= dict.fromkeys(match.group() for match in INSIDE.finditer(name))
            short = INSIDE.sub("", name)
            if short in entries:
                raise CheckpointError(f"{path}: holds {shown(name)} with and without '_orig_mod.'; which one is meant?")
            entries[short] = value
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__} without any")
    own = {name.rpartition(".")[2] for name in tensors} | {"weight", "bias"}
    for name, value in entries.items():
        if not isinstance(value, Tensor) and ("." in name or name in own) and not name.endswith("_extra_state"):
            raise CheckpointError(f"{path}: {shown(name)}: expected a tensor, received {kind_of(value)}")
    check_plain(tensors, path)
    taken = Taken(path, tensors, found.entry, found.why, found.others, tuple(inside), names=tuple(tensors))
    taken = _without_mmcv_averages(taken)
    if prefix is not None:
        return _filled(_cut(taken, _given(taken, prefix)), network)
    if network is not None and (head := _head_for(taken, network)) is not None:
        return _filled(_cut(taken, head), network)
    if partly is not None and (head := _head_for_most(taken, partly)):
        return _cut(taken, head)
    return _filled(_without_wrappers(taken, content), network)


def _without_wrappers(taken: Taken, content: Any) -> Taken:
    """Without what all names begin with and no network's do: parallel training's, and a trainer's attribute."""
    if all(name.startswith(_MODULE) or name in COUNTS for name in taken.tensors):
        averaged = any(name in COUNTS for name in taken.tensors)
        taken = _cut(taken, _MODULE)
        if averaged and all(name.startswith(_MODULE) for name in taken.tensors):  # an average of a parallel network
            taken = _cut(taken, _MODULE)
    first = {name.partition(".")[0] for name in taken.tensors}
    if isinstance(content, Mapping) and LIGHTNING in content and len(first) == 1 and min(first) not in taken.tensors:
        taken = _cut(taken, f"{min(first)}.")
        if all(name.startswith(_MODULE) for name in taken.tensors):
            taken = _cut(taken, _MODULE)
    if all(name.startswith(_ALONE) for name in taken.tensors):
        taken = _cut(taken, _ALONE)
    first = {name[: name.find(".") + 1] for name in taken.tensors}
    wrapped = isinstance(content, Mapping) and LIGHTNING in content and "" not in first
    return dataclasses.replace(taken, several=len(first) > 1 and (wrapped or any(map(AVERAGE.search, first))))


def _without_mmcv_averages(taken: Taken) -> Taken:
    """mmcv 1's EMAHook keeps the weights in training as buffers of other names, and the average in their place."""
    second = {f"ema_{name.replace('.', '_')}" for name in taken.tensors if "." in name} & taken.tensors.keys()
    if not second:
        return taken
    tensors = {name: value for name, value in taken.tensors.items() if name not in second}
    why = f"mmcv's EMAHook: the average of the weights; not those in training, {shown(min(second))}, ..."
    return dataclasses.replace(taken, tensors=tensors, why=why)


def _given(taken: Taken, prefix: str) -> str:
    """The user's prefix as the names have it."""
    wanted = INSIDE.sub("", prefix)
    for head in (wanted, f"{wanted}.", f"{_MODULE}{wanted}", f"{_MODULE}{wanted}."):
        if (not head or head.endswith(".")) and any(name.startswith(head) for name in taken.tensors):
            return head
    raise CheckpointError(f"{taken.path}: none of its names begins with the prefix {shown(prefix)}; {taken.hint()}")


def _head_for_most(taken: Taken, network: nn.Module) -> str:
    """What nearly all names begin with, after which comes a child of a network that has other names inside of it."""
    children = {name for name, _ in network.named_children()}
    own = [name for name in taken.tensors if name not in COUNTS]
    if any(name.partition(".")[0] in children for name in own):
        return ""
    counts: Counter[str] = Counter()
    for name in own:
        parts = name.split(".", 12)
        at = next((number for number, part in enumerate(parts) if part in children), 0)
        counts["".join(f"{part}." for part in parts[:at])] += 1
    head, count = counts.most_common(1)[0]
    return head if 10 * count >= 9 * len(own) else ""


def _head_for(taken: Taken, network: nn.Module) -> str | None:
    """What stands before the network's names in the file's; None where they do not tell.

    Raises:
        CheckpointError: the network is there more than once, with other values.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    if not wanted or wanted.keys() <= taken.tensors.keys() <= network.state_dict().keys():
        return None if not wanted else ""
    counts = heads(taken.tensors, wanted)
    most = max(counts.values(), default=0)
    close = [head for head, count in counts.items() if 2 * count >= len(wanted) and 10 * count >= 9 * most]
    if not close:
        return None
    head = min(close, key=len)
    for other in close:
        if other != head and not _same(taken.tensors, head, other, wanted):
            listed = _listed(close, 5)
            raise CheckpointError(
                f"{taken.path}: holds {type(network).__name__} {len(close)} times, by names that begin with {listed}; "
                f"choose with --prefix (prefix=), such as {shown(head)}"
            )
    average = [
        name
        for name in taken.tensors
        if not name.startswith(head) and name not in COUNTS and AVERAGE.search(name[: name.rfind(".") + 1][:200])
    ]
    if average:
        raise CheckpointError(
            f"{taken.path}: holds {type(network).__name__} by names that begin with {shown(head)}, and an average by "
            f"other names, {_listed(average, 2)}; to take the former: --prefix {head or chr(39) * 2} (prefix=); "
            f"{REMEDY}"
        )
    return head


def _same(tensors: Mapping[str, Tensor], one: str, other: str, wanted: Mapping[str, Any]) -> bool:
    """Are these two the same values, as of a network that has two names?"""
    pairs = [(tensors.get(one + name), tensors.get(other + name)) for name in wanted]
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def _cut(taken: Taken, head: str) -> Taken:
    if not head:
        return taken
    tensors = {name[len(head) :]: value for name, value in taken.tensors.items() if name.startswith(head)}
    left = [name for name in taken.tensors if not name.startswith(head) and name not in COUNTS]
    return dataclasses.replace(taken, tensors=tensors, stripped=(*taken.stripped, head), left=(*taken.left, *left))


def _filled(taken: Taken, network: nn.Module | None) -> Taken:
    """With the network's counts of batches where the file has none, as before torch 0.4 and from some exporters."""
    if network is None:
        return taken
    counts = {
        name: value.detach().clone()
        for name, value in network.state_dict().items()
        if name.rpartition(".")[2] == _COUNT and name not in taken.tensors and isinstance(value, Tensor)
    }
    return dataclasses.replace(taken, tensors=taken.tensors | counts, filled=len(counts))


def _listed(names: Any, most: int) -> str:
    return ", ".join(map(shown, names[:most])) + ", ..." * (len(names) > most)
