"""Which layer of one network is which of the other; refuses where order and shapes do not tell.

Frameworks list layers in different orders where a network branches: torch in the order of definition, Keras by depth.
So layers pair by order only where nothing can have been exchanged:

- Both lists are cut into the shortest pieces that hold the same shapes. Within a piece of several layers, which are
  the same in another order, only a shape that is there once tells which is which.
- Two kernels side by side with equal shapes, of which the second cannot read what the first writes, are branches.
- A norm goes with the kernel whose output it takes; those left over pair by order when no kernel changed places.

What this cannot see: branches of equal shapes that could as well be a chain. `Conversion` lists what was paired.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ...errors import CheckpointError, unknown
from ._layers import KERNELS, Layer, Network, by_name, channels

Pair = tuple[Layer, Layer]


def match(source: Network, target: Network, names: Mapping[str, str]) -> list[Pair]:
    """Each layer of the target with that of the source.

    Args:
        source, target: the networks.
        names: the target's name for a layer of the source, where it has to be said.

    Raises:
        CheckpointError: naming the layers that have no counterpart, or several.
    """
    _settle_kinds(source, target, names)
    pairs = _explicit(source, target, names)
    left = _without(source.layers, [s for s, _ in pairs]), _without(target.layers, [t for _, t in pairs])
    same = _by_equal_names(*left)
    if same is not None:
        return _in_order(target, pairs + same)
    _check_counts(source, target, *left)
    kernels = [[layer for layer in side if layer.kind in (*KERNELS, "dense")] for side in left]
    pairs += _ordered(source, target, kernels[0], kernels[1], "")
    pairs += _attached_norms(pairs, source, target)
    left = _without(source.layers, [s for s, _ in pairs]), _without(target.layers, [t for _, t in pairs])
    _check_counts(source, target, *left)
    unclear = _changed_places(pairs, source, target)
    pairs += _ordered(source, target, *left, unclear)
    return _in_order(target, pairs)


def _settle_kinds(source: Network, target: Network, names: Mapping[str, str]) -> None:
    """Kernels of a file that does not tell are transposed where the other side has only such of that shape."""
    sides = (source, target)
    explicit = [(s, t) for s in source.layers for t in target.layers if names.get(s.name) == t.name]
    for s, t in explicit:
        for this, other in ((s, t), (t, s)):
            if this.kind == "kernel" and other.kind in KERNELS:
                this.kind = "conv" if other.kind == "kernel" else other.kind
    for this, other in (sides, sides[::-1]):
        kinds: dict[tuple[int, ...], set[str]] = defaultdict(set)
        for layer in other.layers:
            if layer.kind in KERNELS:
                kinds[layer.shape].add(layer.kind)
        for layer in this.layers:
            if layer.kind == "kernel" and kinds[layer.shape] == {"transposed"}:
                layer.kind = "transposed"


def _explicit(source: Network, target: Network, names: Mapping[str, str]) -> list[Pair]:
    pairs, taken = [], set()
    for ours, theirs in names.items():
        found = []
        for network, name, what in ((source, ours, "source"), (target, theirs, "target")):
            known = by_name(network.layers)
            if name not in known:
                raise CheckpointError(
                    f"names: the {what} {network.where}: {unknown('layer', name, known)}; give names as source=target"
                )
            found.append(known[name])
        if theirs in taken:
            raise CheckpointError(f"names: {theirs!r} is given for two layers of the source; give each a layer")
        taken.add(theirs)
        if found[0].signature != found[1].signature:
            raise CheckpointError(f"names: {found[0]} cannot become {found[1]}: expected equal kinds and shapes")
        pairs.append((found[0], found[1]))
    return pairs


def _plain(name: str) -> str:
    return name.replace(".", "_").replace("/", "_")


def _by_equal_names(ours: Sequence[Layer], theirs: Sequence[Layer]) -> list[Pair] | None:
    """All by name, where both sides have the same names for the same shapes; numbered names prove nothing in part."""
    one, other = ({_plain(layer.name): layer for layer in side} for side in (ours, theirs))
    if len(one) < len(ours) or one.keys() != other.keys():
        return None
    pairs = [(one[name], other[name]) for name in other]
    return pairs if all(s.signature == t.signature for s, t in pairs) else None


def _check_counts(source: Network, target: Network, ours: Sequence[Layer], theirs: Sequence[Layer]) -> None:
    surplus = Counter(layer.signature for layer in ours)
    surplus.subtract(Counter(layer.signature for layer in theirs))
    alone = {signature: count for signature, count in surplus.items() if count}
    if alone:
        left = [layer for layer in ours if alone.get(layer.signature, 0) > 0]
        right = [layer for layer in theirs if alone.get(layer.signature, 0) < 0]
        more = f"; {len(ours)} and {len(theirs)} layers in all" if len(ours) != len(theirs) else ""
        raise CheckpointError(
            f"{source.where} does not fit {target.where}: without an equal number of counterparts in the source: "
            f"{_listed(left)}; in the target: {_listed(right)}{more}; are they the same network?"
        )


def _ordered(
    source: Network, target: Network, ours: Sequence[Layer], theirs: Sequence[Layer], unclear: str
) -> list[Pair]:
    """Pairs by order, or an error that lists what the order leaves open.

    `unclear` says why order proves nothing here; then only shapes that are there once count.
    """
    pairs: list[Pair] = []
    open_groups: list[tuple[list[Layer], list[Layer]]] = []
    for one, other in _tracks(ours, theirs):
        for left, right in _pieces(one, other):
            for signature in dict.fromkeys(layer.signature for layer in left):
                a = [layer for layer in left if layer.signature == signature]
                b = [layer for layer in right if layer.signature == signature]
                if len(a) == 1:
                    pairs.append((a[0], b[0]))
                else:
                    open_groups.append((a, b))
    if unclear:
        counts = Counter(s.signature for s, _ in pairs)
        loose = [pair for pair in pairs if counts[pair[0].signature] > 1]
        pairs = [pair for pair in pairs if pair not in loose]
        if loose:
            open_groups.append(([s for s, _ in loose], [t for _, t in loose]))
    else:
        parallel = _branches(source, target, pairs)
        if parallel:
            pairs = [pair for pair in pairs if pair not in [p for group in parallel for p in group]]
            open_groups += [([s for s, _ in group], [t for _, t in group]) for group in parallel]
    if open_groups:
        a, b = open_groups[0]
        why = f" ({unclear})" if unclear else ""
        more = f"; {len(open_groups) - 1} more such groups" if len(open_groups) > 1 else ""
        telling = [n.framework for n, side in ((source, a), (target, b)) if any(layer.track for layer in side)]
        better = {"torch": "the module or a .pth file", "keras": "the model or its .keras file"}
        order = "".join(f", or give {better[framework]}, which tells the order" for framework in telling)
        raise CheckpointError(
            f"{source.where}: {_listed(a)} could each be any of {_listed(b)} in {target.where}, order and shapes do "
            f"not tell{why}{more}; say which: names={{{a[0].name!r}: ...}} "
            f"(--names {a[0].name}=...){order}"
        )
    return pairs


def _tracks(ours: Sequence[Layer], theirs: Sequence[Layer]) -> list[tuple[list[Layer], list[Layer]]]:
    """The lists split so that each part is in one order on both sides; parts share no shape."""
    tracks: dict[tuple, tuple[set[str], set[str]]] = {}
    for index, side in enumerate((ours, theirs)):
        for layer in side:
            tracks.setdefault(layer.signature, (set(), set()))[index].add(layer.track)
    parts: dict[tuple, tuple[list[Layer], list[Layer]]] = {}
    for index, side in enumerate((ours, theirs)):
        for layer in side:
            one, other = tracks[layer.signature]
            # A shape on several tracks is a part of its own, in no order.
            key = (*one, *other) if len(one) == len(other) == 1 else ("several", layer.signature)
            parts.setdefault(key, ([], []))[index].append(layer)
    return list(parts.values())


def _pieces(one: list[Layer], other: list[Layer]) -> list[tuple[list[Layer], list[Layer]]]:
    """Both lists cut wherever they hold the same shapes up to there."""
    pieces, start, balance = [], 0, Counter()
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        balance[a.signature] += 1
        balance[b.signature] -= 1
        if not any(balance.values()):
            pieces.append((one[start : i + 1], other[start : i + 1]))
            start = i + 1
    several = len({layer.track for layer in one}) > 1 or len({layer.track for layer in other}) > 1
    return [(one, other)] if several else pieces


def _branches(source: Network, target: Network, pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs that stand side by side in one of the networks with equal shapes and cannot be a chain."""
    groups = {}
    for s, t in pairs:
        known = s.groups or t.groups
        groups[s.name] = known or (s.shape[0] if len(s.shape) > 1 and s.shape[1] == 1 else 1)
    found: list[list[Pair]] = []
    for index, network in enumerate((source, target)):
        mine = {pair[index].name: pair for pair in pairs if pair[index].kind in KERNELS}
        order = [layer.name for layer in network.layers if layer.kind in (*KERNELS, "dense")]
        for first, second in itertools.pairwise(order):
            if first not in mine or second not in mine:
                continue
            a, b = mine[first], mine[second]
            if a[0].signature != b[0].signature or a[index].track != b[index].track:
                continue
            inputs, outputs = channels(a[0], groups[a[0].name])
            if inputs == outputs:
                continue
            if found and found[-1][-1] == a:
                found[-1].append(b)
            elif [a, b] not in found and [b, a] not in found:
                found.append([a, b])
    return found


def _attached_norms(pairs: Sequence[Pair], source: Network, target: Network) -> list[Pair]:
    ours, theirs = by_name(source.layers), by_name(target.layers)
    taken = {s.name for s, _ in pairs}, {t.name for _, t in pairs}
    found = []
    for s, t in pairs:
        if not (s.norm and t.norm) or s.norm in taken[0] or t.norm in taken[1]:
            continue
        if ours[s.norm].signature == theirs[t.norm].signature:
            found.append((ours[s.norm], theirs[t.norm]))
    return found


def _changed_places(pairs: Sequence[Pair], source: Network, target: Network) -> str:
    """Why the order of the norms proves nothing, or an empty string."""
    place = {layer.name: i for i, layer in enumerate(target.layers)}
    kernels = {s.name: t for s, t in pairs if s.kind in KERNELS}
    last: dict[tuple[str, str], int] = {}
    for layer in source.layers:
        if layer.name in kernels:
            t = kernels[layer.name]
            if place[t.name] < last.get((layer.track, t.track), -1):
                return f"kernels around {layer.name} are in another order in the target"
            last[layer.track, t.track] = place[t.name]
    return ""


def _without(layers: Sequence[Layer], used: Sequence[Layer]) -> list[Layer]:
    names = {layer.name for layer in used}
    return [layer for layer in layers if layer.name not in names]


def _in_order(target: Network, pairs: Sequence[Pair]) -> list[Pair]:
    place = {layer.name: i for i, layer in enumerate(target.layers)}
    return sorted(pairs, key=lambda pair: place[pair[1].name])


def _listed(layers: Sequence[Layer]) -> str:
    shown = ", ".join(map(str, layers[:4]))
    return (shown + (f", ... ({len(layers)})" if len(layers) > 4 else "")) or "none"
