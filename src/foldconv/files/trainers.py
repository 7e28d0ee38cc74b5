"""Where trainers put a network's weights in their files, and which of several sets of weights they validate.

A file is a tree of dictionaries. Its *sets* are the dictionaries with tensors by name; what optimizers, schedules and
random generators keep is none. One set: that is it. Several that could be the same network's (an average beside the
last weights, a teacher, an adversary): one of `FORMS` says which of them its trainer validates, or nobody knows and the
user is asked. The entry's name is what ``weights=`` (``--weights``) takes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, shown, unknown

INSIDE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""What compiling and wrapping put into names; nobody's own modules are called so."""
AVERAGE = re.compile(
    r"(?i:(?:^|[._-])(?:ema|swa|averag(?:e|ed|ing)|polyak|shadow)(?:$|[._\d-]))|EMA[A-Z]|[a-z](?:EMA|Ema)"
)
"""How averages of weights are called."""
LIGHTNING = "pytorch-lightning_version"
"""What each file of Lightning's has."""
REMEDY = "for the average, put it into the network with the trainer's own code and save the state_dict()"
"""What to do where only the trainer knows which value is which."""
COUNTS = ("n_averaged", "steps", "num_updates", "initted")
"""How many steps an average has seen, beside its values."""
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights")
"""Where most trainers put the one network that there is."""
_OTHERS = re.compile(
    r"optim(?!al|um|i[sz]ed)|sched|scaler|^opt$|^opt_|hparams|hyper_param|config|args|^frozen_param_"
    r"|(?:grad|momentum|rng|random)(?!.*(?:model|net|coder|teacher|backbone|state_dict))",
    re.I,
)
"""Entries in which no weights are looked for; a momentum encoder has some."""
_DEEPEST, _WIDEST, _MOST = 8, 200, 100


class Form(NamedTuple):
    """Two sets in one file, and which of them counts."""

    trainer: str
    validated: str
    """The entry that the trainer validates."""
    beside: str
    """The entry that it keeps beside it."""
    why: str
    mark: Callable[[Mapping[str, Any]], bool] = lambda content: True
    """Whether a file with these two entries is this trainer's."""


def _is_no_lightning(content: Mapping[str, Any]) -> bool:
    """Some callback of somebody's may have written what is called like another trainer's average."""
    return LIGHTNING not in content


FORMS = (
    Form("timm's saver", "state_dict_ema", "state_dict", "the average of the weights", _is_no_lightning),
    Form(
        "torchvision's references",
        "model_ema",
        "model",
        "the average of the weights",
        # DeiT's and ConvNeXt's have none of these, and evaluate "model".
        lambda content: "n_averaged" in content["model_ema"],
    ),
    Form(
        "mmengine's EMAHook",
        "state_dict",
        "ema_state_dict",
        "the average of the weights, which the hook stores there",
        lambda content: "steps" in content["ema_state_dict"],
    ),
    Form(
        "Lightning's WeightAveraging",
        "state_dict",
        "current_model_state",
        "the average of the weights, which the callback stores there",
        lambda content: "averaging_state" in content,
    ),
    Form(
        "Lightning's StochasticWeightAveraging",
        "state_dict",
        "callbacks.StochasticWeightAveraging.average_model_state",
        "the weights in training; the callback puts the average in their place when training ends",
    ),
    Form(
        "RT-DETR's solver",
        "ema.module",
        "model",
        "the average of the weights",
        lambda content: "updates" in content["ema"],
    ),
    Form(
        "ultralytics",
        "ema",
        "model",
        "the average of the weights",
        lambda content: "train_args" in content and "modelopt" not in content,
    ),
)


class Found(NamedTuple):
    """One set of weights of a file."""

    entry: str
    """Its name, by its way from the top; empty for the file itself."""
    content: Mapping[str, Any]
    why: str = ""
    """What its trainer says it is, where there was a choice."""
    others: tuple[str, ...] = ()
    """The other sets in the file."""


def weights_in(content: Any, path: Any, weights: str = "auto", network: nn.Module | None = None) -> Found:
    """The set of weights that is meant.

    Args:
        content: what a file holds.
        path: the file, for messages.
        weights: the entry, by its name; ``"auto"`` for the one that the file's trainer validates.
        network: what the weights are for, which tells networks apart that are none of one another.

    Raises:
        CheckpointError: for no such entry, or several where nobody can tell.

    >>> weights_in({"state_dict": {"a": torch.ones(2)}, "state_dict_ema": {"a": torch.zeros(2)}}, "net.pth").entry
    'state_dict_ema'
    """
    sets, nameless = dict(_sets(content)), list(_nameless_averages(content))
    if weights != "auto":
        entry = _named(weights, sets, path)
        return Found(entry, sets[entry], "as asked for", tuple(name for name in sets if name != entry))
    if not sets:
        return Found("", content if isinstance(content, Mapping) else {})
    if len(sets) > _MOST:
        raise CheckpointError(
            f"{path}: holds {len(sets):,} dictionaries of tensors, {shown(next(iter(sets)))}, ...; save the "
            "state_dict() alone, or name an entry: --weights ENTRY (weights=)"
        )
    different: dict[str, Mapping[str, Any]] = {}
    for name, found in sets.items():
        if not any(_same(found, other) for other in different.values()):
            different[name] = found
    entry, why = _validated(content, different)
    if entry is None:
        entry = _only(different, path, network)
    if nameless and not why:
        raise CheckpointError(
            f"{path}: holds {_called(entry)} and, in {nameless[0]}; for the former: "
            f"--weights {entry or chr(39) * 2} (weights=); {REMEDY}"
        )
    return Found(entry, sets[entry], why, tuple(name for name in different if name != entry))


def count_tensors(content: Any) -> int:
    """How many tensors a file holds, of weights.

    >>> count_tensors({"model": {"a": torch.ones(1)}, "optimizer": {"b": torch.ones(1)}})
    1
    """
    return sum(isinstance(value, Tensor) for _, found in _sets(content) for value in found.values())


def _validated(content: Any, sets: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, str]:
    """The entry that one of `FORMS` names, and why; None where none is met, or not by these sets alone."""
    for form in FORMS:
        if form.validated in sets and form.beside in sets and form.mark(content):
            third = [
                name
                for name in sets
                if name not in (form.validated, form.beside) and _alike(sets, name, form.validated)
            ]
            if not third:
                return form.validated, f"{form.trainer}: {form.why}"
    return None, ""


def _only(sets: Mapping[str, Mapping[str, Any]], path: Any, network: nn.Module | None) -> str:
    names = list(sets)
    alike = [name for name in names if any(_alike(sets, name, other) for other in names if other != name)]
    if not alike:
        if len(names) == 1:
            return names[0]
        if network is not None and len(fitting := [name for name in names if _fits(sets[name], network)]) == 1:
            return fitting[0]
        known = [name for name in names if name.rpartition(".")[2] in _WRAPPERS]
        if len(known) == 1:
            return known[0]
    listed = ", ".join(map(shown, names[:8])) + ", ..." * (len(names) > 8)
    raise CheckpointError(
        f"{path}: holds {len(names)} dictionaries of tensors, {listed}; save the one that is meant alone, or name it: "
        "--weights ENTRY (weights=)"
    )


def _named(weights: str, sets: Mapping[str, Any], path: Any) -> str:
    """The one entry that a user's name means: all of its way, its end, or its beginning."""
    if weights in sets:
        return weights
    for found in (
        [name for name in sets if name.endswith(f".{weights}")],
        [name for name in sets if name.startswith(f"{weights}.")],
    ):
        if len(found) == 1:
            return found[0]
    raise CheckpointError(f"{path}: {unknown('entry with weights', weights, ['auto', *sets])}")


def _called(entry: str) -> str:
    return shown(entry) if entry else "tensors at its top"


def _sets(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Dictionaries with weights by name, each with its way from the top."""
    used: set[str] = set()
    for entry, value in _walk(content):
        if isinstance(value, Mapping) and any(
            isinstance(name, str) and _is_weight(tensor) for name, tensor in value.items()
        ):
            while entry in used:  # names may have dots
                entry += "'"
            used.add(entry)
            yield entry, value


def _is_weight(value: Any) -> bool:
    """Numbers and states of random generators stand beside weights in many files."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.dtype != torch.uint8


def _nameless_averages(content: Any) -> Iterator[str]:
    """Where averages are that have no names, and what they are; optimizers keep some."""
    for entry, value in _walk(content, everywhere=True):
        is_list = isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) and each.dim() for each in value)
        if is_list and AVERAGE.search(entry):
            yield f"{shown(entry)}, an average of weights without names"
        elif isinstance(value, Mapping) and value.get("train_mode") is True and "params" in value:
            yield f"{shown(entry)}, what turns them into schedule-free training's average (its optimizer's eval())"


def _walk(content: Any, everywhere: bool = False) -> Iterator[tuple[str, Any]]:
    """All containers, breadth first, each once; what optimizers and the like keep only `everywhere`."""
    level, seen = [("", content)], set()
    for _ in range(_DEEPEST):
        below = []
        for entry, value in level:
            yield entry, value
            if id(value) in seen:  # a dictionary may hold itself
                continue
            seen.add(id(value))
            inside: Iterator[tuple[Any, Any]] = iter(())
            if isinstance(value, Mapping):
                inside = iter(value.items())
            elif isinstance(value, (list, tuple)) and len(value) < _WIDEST:
                inside = iter((str(number), each) for number, each in enumerate(value))
            for name, each in inside:
                is_container = isinstance(name, str) and isinstance(each, (Mapping, list, tuple))
                if is_container and (everywhere or not _OTHERS.search(name)):
                    below.append((f"{entry}.{name}" if entry else name, each))
        level = below


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Are these the same tensors by the same names? Not only equal ones: those of two networks may be, at the start."""
    own, its = ({n: v for n, v in each.items() if isinstance(v, Tensor)} for each in (one, other))
    return own.keys() == its.keys() and all(map(_is_one, own.values(), (its[name] for name in own)))


def _is_one(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    places = [
        (each.data_ptr(), each.dtype, each.shape, each.stride())
        for each in (one, other)
        if type(each) is Tensor and each.layout == torch.strided and not each.is_meta and each.numel()
    ]
    return len(places) == 2 and places[0] == places[1]


def _alike(sets: Mapping[str, Mapping[str, Any]], one: str, other: str) -> bool:
    """Could these be the same network's? By the ends of the names and the shapes, since what is before them differs.

    By shapes alone where one is called an average: some are kept by names without dots.
    """
    named = not (AVERAGE.search(one) or AVERAGE.search(other))
    first, second = _ends(sets[one], named), _ends(sets[other], named)
    return 2 * (first & second).total() >= max(1, min(first.total(), second.total()))


def _ends(content: Mapping[str, Any], named: bool) -> Counter:
    return Counter(
        (
            ".".join(INSIDE.sub("", name).rsplit(".", 2)[-2:]).removeprefix("module.") if named else "",
            tuple(tensor.shape),
        )
        for name, tensor in content.items()
        if isinstance(name, str) and _is_weight(tensor)
    )


def _fits(content: Mapping[str, Any], network: nn.Module) -> bool:
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    return any(count == len(wanted) for count in heads(content, wanted).values())


def heads(content: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> Counter[str]:
    """What stands before the wanted names in a file's, and before how many of them: name and shape have to agree.

    >>> content = {"net.a.weight": torch.ones(2), "net.b": torch.ones(1), "head.b": torch.ones(1)}
    >>> heads(content, {"a.weight": (2,), "b": (1,)})
    Counter({'net.': 2, 'head.': 1})
    """
    deepest = max((name.count(".") for name in wanted), default=0) + 1
    found: Counter[str] = Counter()
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            continue
        parts = INSIDE.sub("", name).rsplit(".", deepest)
        for number in range(len(parts)):
            if wanted.get(".".join(parts[number:])) == tuple(tensor.shape):
                found["".join(f"{part}." for part in parts[:number])] += 1
    return found
