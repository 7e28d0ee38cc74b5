"""`range_report`: what int8 will meet in a network: ranges of weights and activations, channel by channel.

With one scale for a whole tensor, its largest channel decides the step: a channel whose range is r times smaller gets
127 / r of the 127 steps to each side. M. Nagel, M. van Baalen, T. Blankevoort, M. Welling: Data-free quantization
through weight equalization and bias correction, ICCV 2019, figure 2 and section 3.1.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..algebra.convolutions import PLAIN
from ..errors import FoldConvError, UnsupportedError
from ..network._tracing import HARMLESS
from ..network._watching import arguments_of
from ..network.table import align
from ..network.tree import expect_module, first_names
from .calibration import batches_of
from .equalize import by_output
from .export import deployable, reason
from .inputs import as_weights

STEPS = 127
"""Steps of int8 to each side of zero."""
HEAVY = 8.0
"""From this ratio on, the median channel is left with less than 16 steps, four bits."""
OUTLIER = 8.0
"""From this ratio on, of the largest activation to what all but one in a thousand stay below."""
_SHARE = 0.999
_SAMPLED = 2**19
"""Activations of one call that are sorted at most, at even distances."""
_CLIPPING = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clip_")
"""Functions that quantizers join with the layer before: what they cut off is never stored."""


@dataclasses.dataclass(frozen=True)
class ChannelRanges:
    """The smallest and the largest value of each channel."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def largest(self) -> tuple[float, ...]:
        """Each channel's largest absolute value."""
        return tuple(max(abs(low), abs(high)) for low, high in zip(self.low, self.high))

    @property
    def ratios(self) -> tuple[float, ...]:
        """The same relative to the median of the channels that hold anything but zeros."""
        largest = self.largest
        median = statistics.median([value for value in largest if value] or [1.0])
        return tuple(value / median for value in largest)

    @property
    def heaviest(self) -> int:
        """The channel with the largest ratio."""
        return self.ratios.index(max(self.ratios))

    @property
    def ratio(self) -> float:
        """Its ratio."""
        return max(self.ratios)


@dataclasses.dataclass(frozen=True)
class LayerRanges:
    """One convolution or linear layer of the folded network, by its output channels.

    Attributes:
        name, layer: its name and its class.
        weights: of the kernel, batch norm absorbed.
        activations: of its output, behind the ReLU (ReLU6, clamp) that alone reads it; None: the layer was not called.
        outlier: the largest activation relative to what 99.9 % of them stay below.
        hurts: what will hurt int8, in words.
    """

    name: str
    layer: str
    weights: ChannelRanges
    activations: ChannelRanges | None
    outlier: float | None
    hurts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RangeReport:
    """What `range_report` found; print it for a table. `samples` is how many were looked at."""

    layers: tuple[LayerRanges, ...]
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""

        def plain(ranges: ChannelRanges | None) -> dict[str, Any] | None:
            if ranges is None:
                return None
            return {"low": list(ranges.low), "high": list(ranges.high), "ratios": list(ranges.ratios)}

        return {
            "samples": self.samples,
            "layers": [
                {**vars(each), "weights": plain(each.weights), "activations": plain(each.activations)}
                | {"hurts": list(each.hurts)}
                for each in self.layers
            ],
        }

    def __str__(self) -> str:
        rows = [("layer", "type", "weights", "× median", "channel", "activations", "× median", "channel", "outlier")]
        for each in self.layers:
            found, cells = each.activations, ("-", "-", "-", "-")
            if found is not None:
                span = f"{min(found.low):.3g} … {max(found.high):.3g}"
                cells = (span, f"{found.ratio:.1f}", str(found.heaviest), f"{each.outlier:.1f}")
            w = each.weights
            own = (f"±{max(w.largest):.3g}", f"{w.ratio:.1f}", str(w.heaviest))
            rows.append((each.name or "(root)", each.layer, *own, *cells))
        note = f"of the folded network, {self.samples} samples; × median: the heaviest channel's range; "
        note += "outlier: the largest activation relative to what 99.9 % stay below"
        hurts = [f"{each.name or '(root)'}: {text}" for each in self.layers for text in each.hurts]
        return "\n".join([align(rows), note, *(hurts or ["nothing here will hurt int8"])])


@torch.no_grad()
def range_report(model: nn.Module, calibration: Any) -> RangeReport:
    """Ranges of weights and activations by layer and channel, as int8 will meet them, and what will hurt.

    The network that is deployed is looked at: folded, batch norms absorbed, in evaluation mode, in 32 bits.

    Args:
        model: expanded or not; it is not touched.
        calibration: what the model is called with: a tensor (batch, ...), a tuple of tensors or a dictionary of them by
            keyword; or an iterable of such batches. Labels in a loader's pairs are left out.

    Returns:
        A `RangeReport` with a `LayerRanges` for each convolution and linear layer, in the network's order. Ranges are
        in the units of the tensors, ratios have none.

    Raises:
        TypeError: the model is no module, or the calibration no data.
        UnsupportedError: there are no samples, or some that are not finite or that the network does not take; weights
            without values, or that are not finite; a network without layers.

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV 2019, figure 2.

    Example:
        >>> import foldconv
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> _ = net[0].weight.data[5].mul_(100)
        >>> report = foldconv.range_report(foldconv.expand(net, "doconv"), torch.randn(16, 3, 9, 9))
        >>> report.layers[0].weights.heaviest, 50 < report.layers[0].weights.ratio < 200
        (5, True)
        >>> print(report.layers[0].hurts[0].partition(":")[0])
        channel 5's weights are ... times the median channel's
    """
    expect_module(model)
    batches = batches_of(calibration)
    first = next(batches)
    network = _folded(model, first)
    names = {module: name for module, name in first_names(network).items() if isinstance(module, (*PLAIN, nn.Linear))}
    if not names:
        raise UnsupportedError(f"{type(model).__name__} has no convolution and no linear layer to look at")
    weights = {module: _weights(name, module) for module, name in names.items()}
    watch, samples = _Watch(names), 0
    with watch:
        for batch in _again(first, batches):
            args, kwargs = arguments_of(batch)
            samples += len((*args, *kwargs.values())[0])
            try:
                network(*args, **kwargs)
            except FoldConvError:
                raise
            except Exception as error:  # a forward raises whatever it likes
                shapes = ", ".join(str(tuple(value.shape)) for value in (*args, *kwargs.values()))
                raise UnsupportedError(f"calibration: the network fails on {shapes}: {reason(error)}") from None
            watch.close()
    layers = (_layer(name, module, weights[module], watch.found.get(module)) for module, name in names.items())
    return RangeReport(tuple(layers), samples)


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _folded(model: nn.Module, batch: Any) -> nn.Module:
    """The deployed network in 32 bits; data flow is looked at with two samples, which take no time."""
    args, kwargs = arguments_of(batch)
    alike = len({len(value) for value in (*args, *kwargs.values())}) == 1
    few = [value[:2] if alike else value for value in (*args, *kwargs.values())]
    few = as_weights(model, few)
    example: Any = dict(zip(kwargs, few)) if kwargs else tuple(few)
    try:
        return deployable(model, example).float().cpu()
    except UnsupportedError as error:
        raise UnsupportedError(str(error).replace("example_inputs: ", "calibration: ", 1)) from None


@dataclasses.dataclass
class _Found:
    """Ranges by channel over all calls so far, and of each call what 99.9 % stay below, with how many there were."""

    low: Tensor
    high: Tensor
    shares: list[tuple[float, int]]

    def join(self, other: _Found) -> None:
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.shares += other.shares


@dataclasses.dataclass
class _Call:
    """A layer's output: as it is, and as the function leaves it that alone reads it, if that clips."""

    layer: nn.Module
    output: weakref.ref[Tensor]
    plain: _Found
    clipped: _Found | None = None
    read: bool = False


class _Watch(TorchFunctionMode):
    """Looks at the output of each layer, and at who reads it."""

    def __init__(self, names: dict[nn.Module, str]):
        super().__init__()
        self._names = names
        self._calls: dict[int, _Call] = {}
        self._done: list[_Call] = []
        self.found: dict[nn.Module, _Found] = {}
        for layer in names:
            layer.register_forward_hook(self._see)

    def _see(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            call = _Call(layer, weakref.ref(output), _measured(layer, self._names[layer], output))
        self._done.append(call)
        self._calls[id(output)] = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls = [] if func in HARMLESS else [self._call_of(value) for value in tree_leaves((args, kwargs))]
        result = func(*args, **kwargs or {})
        for call in filter(None, calls):
            clips = getattr(func, "__name__", "") in _CLIPPING and not call.read
            call.clipped = _measured(call.layer, self._names[call.layer], result) if clips else None
            call.read = True
            if result is call.output():  # changed in place: who reads it now reads what is clipped
                del self._calls[id(result)]
        return result

    def _call_of(self, value: Any) -> _Call | None:
        call = self._calls.get(id(value))
        return call if call is not None and call.output() is value else None

    def close(self) -> None:
        """A batch has gone through: nobody reads its tensors any more."""
        for call in self._done:
            found = call.plain if call.clipped is None else call.clipped
            if call.layer in self.found:
                self.found[call.layer].join(found)
            else:
                self.found[call.layer] = found
        self._calls.clear()
        self._done.clear()


def _measured(layer: Any, name: str, output: Tensor) -> _Found:
    """One call's output by channel."""
    channel = output.dim() - 1 if isinstance(layer, nn.Linear) else output.dim() - len(layer.kernel_size) - 1
    flat = output.movedim(channel, 0).flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise UnsupportedError(f"{name or 'the root'}: its output on the calibration holds NaN or infinity")
    sizes = output.abs().flatten()
    sizes = sizes[:: -(-len(sizes) // _SAMPLED)]
    return _Found(low, high, [(float(sizes.kthvalue(math.ceil(_SHARE * len(sizes))).values), output.numel())])


def _weights(name: str, module: Any) -> ChannelRanges:
    weights = by_output(module)
    if not torch.isfinite(weights).all():
        raise UnsupportedError(f"{name or 'the root'}: its weights hold NaN or infinity")
    return _ranges(weights.amin(1), weights.amax(1))


def _layer(name: str, module: nn.Module, own: ChannelRanges, found: _Found | None) -> LayerRanges:
    if found is None:
        return LayerRanges(name, type(module).__name__, own, None, None, (*_heavy(own, "weights"), "was not called"))
    outputs = _ranges(found.low, found.high)
    below = sum(share * count for share, count in found.shares) / sum(count for _, count in found.shares)
    largest = max(outputs.largest)
    outlier = largest / below if below else 1.0
    hurts = (*_heavy(own, "weights"), *_heavy(outputs, "activations"))
    if outlier >= OUTLIER:
        hurts += (
            f"an activation of {largest:.3g} is {outlier:.0f} times what 99.9 % stay below: with the whole range, "
            f"those keep {STEPS / outlier:.1f} of {STEPS} steps; calibrate by a percentile, or leave it in float",
        )
    return LayerRanges(name, type(module).__name__, own, outputs, outlier, hurts)


def _ranges(low: Tensor, high: Tensor) -> ChannelRanges:
    return ChannelRanges(tuple(low.tolist()), tuple(high.tolist()))


def _heavy(ranges: ChannelRanges, what: str) -> tuple[str, ...]:
    """What a channel costs that is much larger than the others."""
    if ranges.ratio < HEAVY:
        return ()
    remedy = "equalize" if what == "activations" else "equalize, or a scale per channel"
    return (
        f"channel {ranges.heaviest}'s {what} are {ranges.ratio:.1f} times the median channel's: with one scale, that "
        f"keeps {STEPS / ranges.ratio:.1f} of {STEPS} steps; {remedy}",
    )
