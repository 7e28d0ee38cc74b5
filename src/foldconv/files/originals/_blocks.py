"""What the importers of block checkpoints share.

The originals put a block (branches, norms, activation) where the plain network has a convolution and its norm:

    stage1.0.rbr_dense.conv.weight, stage1.0.rbr_1x1.bn.bias, ...    the block ``stage1.0`` of a checkpoint
    stage1.0.conv, stage1.0.bn                                        the same place in the plain network

So the plain counterpart of a block ``X`` is a module ``X`` with one convolution in it that a norm follows, or that
convolution itself; which norm follows which convolution is a question of data flow, not of names. That is also how the
originals name their networks without blocks (type ``base``), and the zoo follows them. Everything outside of blocks has
to have one name in both.

A checkpoint that was already folded by the original's own code (``X.rbr_reparam.weight``) becomes the folded network,
``foldconv.fold(model, batchnorm=True)`` with the checkpoint's values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...algebra.convolutions import PLAIN
from ...errors import CheckpointError, UnsupportedError
from ...methods import Method, method_from_json
from ...network.dataflow import DataFlow
from ...network.expand import expanded_layers, put_in
from ...network.fold import fold
from ...network.tree import copy_of
from ..native import load_exactly
from ..reading import check_floating

NORM = "norm"
"""Stands in `Layer.names` for the norm that follows the convolution."""


class Layer(NamedTuple):
    """How one block is imported."""

    method: Method
    """What the convolution is expanded with."""
    names: Mapping[str, str]
    """The original's names inside the block (of modules or tensors) to those inside our layer, or `NORM`."""
    tensors: dict[str, Tensor]
    """The block's tensors under their original names, as our layer wants them."""


def as_named(method: Method, names: Mapping[str, str]) -> Callable[[dict[str, Tensor], Any], Layer]:
    """For blocks that need nothing but other names."""
    return lambda tensors, conv: Layer(method, names, tensors)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of one source repository.

    Args:
        title: what the blocks are called in messages.
        mark: pattern of the tensor, relative to its block, by which a block is recognized.
        layer: from a block's tensors, by name relative to the block, and its plain convolution to a `Layer`; raises
            `CheckpointError` for what has no equivalent.
        folded: names that the convolution of a block can have once the original's own code has folded it.
        takes_norm: whether a norm follows the convolution.
    """

    title: str
    mark: str
    layer: Callable[[dict[str, Tensor], Any], Layer]
    folded: tuple[str, ...] = ()
    takes_norm: bool = True

    def recognize(self, keys: Iterable[str]) -> tuple[list[str], bool]:
        """The names of the blocks in a checkpoint, and whether the original's code has folded them."""
        keys = list(keys)
        blocks = owners(self.mark, keys)
        if blocks or not self.folded:
            return blocks, False
        blocks = owners(rf"(?:{'|'.join(self.folded)})\.weight", keys)
        return blocks, bool(blocks)

    def __call__(
        self, tensors: dict[str, Tensor], model: nn.Module, path: str, options: dict[str, Any] | None = None
    ) -> nn.Module:
        """The network of a checkpoint around the plain `model`; `options` of the method that no checkpoint tells."""
        blocks, folded = self.recognize(tensors)
        if not blocks:
            raise CheckpointError(f"{path}: holds no {self.title} block; is it a plain network's?")
        pairs = DataFlow(model).pairs if self.takes_norm else {}
        names = {module: name for name, module in model.named_modules()}
        convs = self._convolutions(blocks, model, pairs, path)
        if folded:
            table = {_join(block, name): names[conv] for block, conv in convs.items() for name in self.folded}
            return _load(fold(model, batchnorm=True, blocks=False, check=False), tensors, table, path)
        work, left, table = copy_of(model), dict(tensors), {}
        modules = dict(work.named_modules())
        chosen: dict[str, tuple[nn.Module, Method]] = {}
        norms: dict[nn.Module, nn.Module] = {}
        for block, conv in convs.items():
            prefix, place, norm = _join(block, ""), names[conv], pairs.get(conv)
            own = {key[len(prefix) :]: left.pop(key) for key in tensors if key.startswith(prefix)}
            check_floating({prefix + key: value for key, value in own.items()}, path)
            try:
                layer = self.layer(own, conv)
            except (CheckpointError, UnsupportedError) as error:  # the latter: sizes that no method has
                raise CheckpointError(f"{path}: {block or 'the root'}: {error}") from None
            method = method_from_json(layer.method.to_json() | (options or {}))
            reason = method.reason_against(conv, norm)
            if reason is not None:
                raise CheckpointError(
                    f"{path}: holds a {self.title} block {block!r}, but {place or 'the root'} of "
                    f"{type(model).__name__} cannot become {method.name}: {reason}"
                )
            chosen[place] = modules[place], method
            if norm is not None:
                norms[modules[place]] = modules[names[norm]]
            left |= {prefix + key: value for key, value in layer.tensors.items()}
            for theirs, ours in layer.names.items():
                table[prefix + theirs] = names[norm] if norm is not None and ours == NORM else _join(place, ours)
        # The values come from the file: no need to start from the plain network's, which some layers could not.
        work = put_in(work, expanded_layers(chosen, norms, "paper"))
        return _load(work, left, table, path)

    def _convolutions(
        self, blocks: list[str], model: nn.Module, pairs: dict[nn.Module, nn.Module], path: str
    ) -> dict[str, Any]:
        """The plain network's convolution in the place of each block."""
        what = "one convolution that a norm follows" if self.takes_norm else "one convolution"
        taken: dict[nn.Module, str] = {}
        for block in blocks:
            inside = [module for name, module in model.named_modules() if f"{name}.".startswith(_join(block, ""))]
            found = [m for m in inside if type(m) in PLAIN and (m in pairs or not self.takes_norm)]
            if len(found) != 1:
                has = f"{len(found)} such in {type(inside[0]).__name__}" if inside else "no module"
                raise CheckpointError(
                    f"{path}: holds a {self.title} block {block!r}, but {type(model).__name__} has {has} there; "
                    f"expected {what}: is it the plain network of this checkpoint?"
                )
            if taken.setdefault(found[0], block) != block:
                raise CheckpointError(
                    f"{path}: holds {self.title} blocks {taken[found[0]]!r} and {block!r}, but {type(model).__name__} "
                    "has one convolution for both"
                )
        return {block: conv for conv, block in taken.items()}


def renamed(name: str, table: Mapping[str, str]) -> str:
    """A dotted name with its longest prefix in `table` replaced; as it is when there is none.

    >>> renamed("a.bn.weight", {"a": "x", "a.bn": "x.norm"}), renamed("b.weight", {"a": "x"})
    ('x.norm.weight', 'b.weight')
    """
    head, tail = name, ""
    while head:
        if head in table:
            return _join(table[head], tail) if tail else table[head]
        head, _, last = head.rpartition(".")
        tail = f"{last}.{tail}" if tail else last
    return name


def _load(model: nn.Module, tensors: dict[str, Tensor], table: dict[str, str], path: str) -> nn.Module:
    """Load by our names; messages use the original's."""
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = renamed(key, table)
        if name in ours:
            raise CheckpointError(f"{path}: holds both {origin[name]} and {key}, which stand for the same tensor")
        ours[name], origin[name] = tensor, key
    for name, value in model.state_dict().items():
        # Counted by torch since 0.4 only, left out by some exporters, and read by no norm with a momentum.
        if name.endswith("num_batches_tracked"):
            ours.setdefault(name, value)
    back = {mine: theirs for theirs, mine in reversed(table.items())}
    load_exactly(model, ours, path, called=lambda name: origin.get(name) or renamed(name, back))
    return model


def owners(pattern: str, keys: Iterable[str]) -> list[str]:
    r"""What stands before a pattern in the keys that end with it, each once.

    >>> owners(r"rbr_dense\.weight", ["a.0.rbr_dense.weight", "a.0.rbr_1x1.weight"])
    ['a.0']
    """
    # The shortest owner: a pattern may begin with an optional part.
    matches = (re.fullmatch(rf"(?:(.*?)\.)??(?:{pattern})", key) for key in keys)
    return list(dict.fromkeys(match[1] or "" for match in matches if match))


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
