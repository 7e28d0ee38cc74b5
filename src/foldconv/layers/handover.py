"""`Handover`: what a branched layer gives must reach the place of its norm, and nobody else.

The norm is applied already when the layer's output is on its way. A layer that is called by another module's code
therefore gives an `Unplaced` tensor, which tells who it is, takes what changes no value (a copy, a cast, a view of all
of it) and refuses to be computed with; `NormPlace` makes an ordinary tensor of it. Some of torch's machinery hands on
the memory alone (backward hooks, checkpoints): that is known by its storage.

A layer that a script calls for a look gives an ordinary tensor, and what a part of the network gives that was cut off
between the two is the script's to judge. A compiler, tracer or function transform that looks on is shown the function
alone.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import UnsupportedError
from ..ops import is_recorded
from .foldable import name_among_callers

_MOST = 64
"""Outputs of one layer that are known by their storage: a head shared over levels has a few."""
_CALLS = nn.Module._call_impl.__code__
_aside = threading.local()


def _attributes(names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names.split()}


def _methods(names: str) -> set[Any]:
    return {getattr(Tensor, name) for name in names.split()}


_VALUES = _attributes("T H mT mH real imag") | {Tensor.data.__set__}  # pyright: ignore
"""Attributes that are more than a question."""
_ABOUT = _methods("__hash__ __len__ register_hook retain_grad record_stream new_zeros new_ones new_empty new_full")
_ABOUT |= _methods("size dim numel nelement stride storage_offset element_size untyped_storage data_ptr get_device")
_ABOUT |= _methods(
    "is_floating_point is_complex is_contiguous is_inference is_set_to is_pinned is_shared dim_order _is_view"
)
_ABOUT |= _methods("is_conj is_neg is_coalesced _is_zerotensor") | {torch.is_conj, torch.is_neg}  # compilers ask
_ABOUT |= {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_inference, torch.result_type}
_ABOUT |= {torch.zeros_like, torch.ones_like, torch.empty_like, torch.rand_like, torch.randn_like, torch.full_like}
_ABOUT |= _methods("isnan isinf isfinite") | {torch.isnan, torch.isinf, torch.isfinite}
"""Read no value, or ask only whether it is a number: watchers of training do."""
_KEEPING = _methods("detach detach_ clone contiguous to cpu cuda float double half bfloat16 type type_as")
_KEEPING |= _methods("requires_grad_") | _attributes("data") | {torch.clone, torch.detach}
"""Leave every value as it is, but for its type."""
_PERHAPS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_PERHAPS |= {torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.reshape, torch.squeeze, torch.flatten}
_PERHAPS |= _methods("view view_as reshape reshape_as expand expand_as squeeze flatten narrow __getitem__")
"""Nothing is done if what comes back lies where the tensor does, all of it."""


class Handover:
    """What is on its way from a layer to its `NormPlace`; both hold it, and copies made together hold one of theirs.

    Attributes:
        place: weakly, the norm's place.
        given: outputs by storage, for those that lose their class on the way.
        unseen: a compiler or another onlooker has run the layer, whose outputs are any tensors since.
    """

    def __init__(self) -> None:
        self.place: Any = lambda: None
        self.given: deque[tuple[StorageWeakRef, tuple[Any, ...], int]] = deque(maxlen=_MOST)
        self.unseen = False

    def __deepcopy__(self, memo: Any) -> Handover:
        return Handover()

    def __reduce__(self) -> Any:
        return Handover, ()

    def give(self, layer: Any, output: Any) -> Any:
        """The layer's output, as it leaves the layer."""
        if is_recorded():
            self.unseen = True
            return output
        if type(output) is not Tensor or getattr(_aside, "depth", 0):
            return output
        caller, compiled = _caller_of(layer)
        if compiled:
            self.unseen = True
            return output
        if caller is not None:
            place = self.place()
            if place is None:
                raise UnsupportedError(
                    f"{name_among_callers(layer)}: its norm is inside, and the NormPlace that stood for it is gone: "
                    "another module in its place, or a copy of the layer alone, is not the plain network; fold first, "
                    "copy the network as a whole, or expand with exclude= for this convolution"
                )
        self.given.append((StorageWeakRef(output.untyped_storage()), _place_of(output), _version(output)))
        return output if caller is None else Unplaced.of(output, self, caller)

    def take(self, place: Any, input: Tensor) -> Tensor:
        """What the place of the norm gets, as an ordinary tensor if it is what the layer gave."""
        if type(input) is Unplaced:
            if input._handover is not self:
                self.refuse(place, "received that of another layer")
            return input.ordinary()
        if getattr(_aside, "depth", 0):
            return input
        storage, where = input.untyped_storage()._cdata, _place_of(input)
        for number, (reference, given, version) in enumerate(self.given):
            if reference.cdata == storage and given == where:
                del self.given[number]
                if version == _version(input):
                    return input
                break
        else:
            layer = place.link[0]
            if self.unseen or "forward" in vars(layer) or vars(layer).get("_compiled_call_impl") is not None:
                return input
        self.given.clear()
        self.refuse(place, "received another tensor")

    def refuse(self, place: Any, received: str, parent: nn.Module | None = None) -> NoReturn:
        """Raise, naming the place and the layer."""
        layer = place.link[0]
        raise UnsupportedError(
            f"{name_among_callers(place, parent)}: expected the output of {name_among_callers(layer, parent)}, which "
            f"applies the norm that was here, and {received}: what is done between them would come before the norm in "
            "the plain network; expand with exclude= for this convolution, or copy and cut the folded network"
        )


class Unplaced(Tensor):
    """The output of a branched layer whose norm's place has not had it yet."""

    _given: Tensor
    _handover: Handover
    _caller: Any

    @staticmethod
    def of(output: Tensor, handover: Handover, caller: Any) -> Unplaced:
        """The same tensor, watched."""
        made: Any = output.as_subclass(Unplaced)
        made._given, made._handover, made._caller = output, handover, caller
        return made

    def ordinary(self) -> Tensor:
        """The same tensor, no longer watched."""
        with torch._C.DisableTorchFunctionSubclass():
            # A function's view of it (backward hooks make one) takes no in-place activation: a copy does, as a norm's
            # output would.
            return self._given if self._has_no_history() else self.as_subclass(Tensor).clone()

    def _has_no_history(self) -> bool:
        """Has no autograd function given this object a history of its own?"""
        given, node = self._given, self.grad_fn
        if self.requires_grad != given.requires_grad:
            return False
        return node is None or (bool(node.next_functions) and node.next_functions[0][0] is given.grad_fn)

    def __deepcopy__(self, memo: Any) -> Tensor:
        """An ordinary tensor: somebody kept this one, and what is copied goes nowhere."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__deepcopy__(memo)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions, pass on what leaves every value as it is, refuse anything else."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            asks = getattr(func, "__name__", "") in ("__get__", "__set__") and func not in _VALUES
            if func in _ABOUT or (asks and func not in _KEEPING):
                if func.__name__ != "__set__":  # hooks, too, belong to what goes on from here
                    args = [a._given if isinstance(a, cls) and a._has_no_history() else a for a in args]
                return func(*args, **kwargs)
            first = args[0] if args else None
            if func in _KEEPING or func in _PERHAPS:
                result = func(*args, **kwargs)
                if not isinstance(first, cls) or not isinstance(result, Tensor):
                    return result
                if result is first:
                    return first
                if func in _KEEPING or _is_same(result, first):
                    return cls.of(result.as_subclass(Tensor), first._handover, first._caller)
        ours = first if isinstance(first, cls) else next(iter(_unplaced_in((args, kwargs))), None)
        if ours is None:
            return NotImplemented
        place, caller = ours._handover.place(), ours._caller
        # A part of the network, cut off before the place, may have been run by a script, which knows.
        if place is None or (
            all(m is not place for m in caller.modules()) and _whose_method(sys._getframe(1), None) is None
        ):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        ours._handover.refuse(place, f"it went to {getattr(func, '__name__', func)}", caller)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Layers and the places of norms are run one by one in here, by somebody who knows."""
    _aside.depth = getattr(_aside, "depth", 0) + 1
    try:
        yield
    finally:
        _aside.depth -= 1


def _caller_of(layer: Any) -> tuple[nn.Module | None, bool]:
    """The outermost module whose code called a layer, None for a script's; and is it compiled code that left it out?"""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    theirs = None if compiler is None else compiler.__file__
    outermost, frame = None, sys._getframe(2)
    start = frame
    while frame is not None:
        if frame.f_code is _CALLS:
            outermost = frame
        elif frame.f_code.co_filename == theirs:
            return None, True
        frame = frame.f_back
    found = None if outermost is None else outermost.f_locals["self"]
    return (_whose_method(start, layer) if found is None or found is layer else found), False


def _whose_method(frame: Any, layer: Any) -> nn.Module | None:
    """The module whose method runs, no forward perhaps, but a training step."""
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module is not layer:
            return module
        frame = frame.f_back
    return None


def _unplaced_in(value: Any) -> Iterator[Unplaced]:
    if isinstance(value, Unplaced):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _unplaced_in(item)
    elif isinstance(value, dict):
        yield from _unplaced_in(list(value.values()))


def _is_same(a: Tensor, b: Tensor) -> bool:
    alike = _place_of(a) == _place_of(b) and a.stride() == b.stride()
    return alike and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.storage_offset()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
