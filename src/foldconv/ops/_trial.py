"""A path on trial: what it computes is compared with torch's operations when tensors of a kind first come by.

The GPU's kernels have been compiled for GPUs and run in Triton's interpreter, which is not the same as having run on
every GPU with every version of Triton. So the first result for each shape, layout and dtype is compared, in double
precision and against the rounding that the formula may have. A difference, or a kernel that does not start, and the
path steps aside for the rest of the process, with one warning; what that call returns is already torch's.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

import torch
from torch import Tensor

from . import _torch
from ._context import VARIABLE
from ._torch import Orepa

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
"""Of what the formula gives for the absolute values: many roundings, and far from a wrong term."""
_COSINES = Orepa._fields.index("cosines")


class Trial:
    """A path, as a `foldconv.ops.Path` of the same name."""

    def __init__(self, path: Any):
        self.path, self.name, self.least = path, path.name, path.least
        self.failure: str | None = None
        """Why it stepped aside."""
        self._passed: set[Any] = set()

    def reason_against(self, *tensors: Tensor) -> str | None:
        """Why the path cannot take these tensors."""
        return self.failure or self.path.reason_against(*tensors)

    def depthwise(self, taps: Tensor, D: Tensor, groups: int) -> Tensor:
        """See `foldconv.ops.compose_depthwise`."""
        return self._run("depthwise", (taps, D), groups)

    def depthwise_gradients(self, grad: Tensor, taps: Tensor, D: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """The gradients of `taps` and `D`."""
        return self._run("depthwise", (taps, D), groups, grad)

    def orepa(self, p: Orepa, groups: int) -> Tensor:
        """See `foldconv.ops.compose_orepa`."""
        return self._run("orepa", p, groups)

    def orepa_gradients(self, grad: Tensor, p: Orepa, groups: int) -> Orepa:
        """The gradient of every field but the cosines."""
        return Orepa(*self._run("orepa", p, groups, grad))

    def _run(self, name: str, fields: tuple[Any, ...], groups: int, grad: Tensor | None = None) -> Any:
        first = fields[0]
        arguments = (fields if name == "depthwise" else (fields,)) + (groups,)
        shapes = [None if t is None else t.shape for t in fields if not isinstance(t, int)]
        kind = (name, groups, first.stride(), first.dtype, first.device, grad is None, *shapes)
        if self.failure is None and kind in self._passed:
            return self._call(name, arguments, grad)
        # While a CUDA graph is captured nobody can look at a result.
        capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.failure is None and not capturing:
            try:
                found = self._call(name, arguments, grad)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                line = (str(error).splitlines() or [""])[0]
                self._step_aside(f"did not run ({type(error).__name__}: {line})", first)
            else:
                fault = _fault(found, name, fields, groups, grad)
                if fault is None:
                    self._passed.add(kind)
                    return found
                self._step_aside(fault, first)
        return _by_torch(name, fields, groups, grad)

    def _call(self, name: str, arguments: tuple[Any, ...], grad: Tensor | None) -> Any:
        if grad is None:
            return getattr(self.path, name)(*arguments)
        return getattr(self.path, f"{name}_gradients")(grad, *arguments)

    def _step_aside(self, fault: str, first: Tensor) -> None:
        self.failure = f"it stepped aside: {fault}"
        device = torch.cuda.get_device_name(first.device) if first.is_cuda else str(first.device)
        warnings.warn(
            f"foldconv: path {self.name!r} {fault}, for kernels of shape {tuple(first.shape)} in {first.dtype} on "
            f"{device}; torch's operations compose from here on. Please report this line, with torch "
            f"{torch.__version__} and Triton {_version('triton')}; {VARIABLE}=torch leaves the path out",
            RuntimeWarning,
            stacklevel=2,
        )


def _fault(found: Any, name: str, fields: tuple[Any, ...], groups: int, grad: Tensor | None) -> str | None:
    """What is wrong with a result; None for nothing."""
    exact = _by_torch(name, _each(fields, Tensor.double), groups, None if grad is None else grad.double())
    sizes = _each(fields, lambda t: t.double().abs())
    size = _by_torch(name, sizes, groups, None if grad is None else grad.double().abs())
    for received, wanted, scale in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, exact, size))):
        if not isinstance(wanted, Tensor):
            continue
        if not wanted.isfinite().all():
            continue  # diverged; nothing to compare
        off = (received.double() - wanted).abs() / scale.clamp(min=torch.finfo(torch.float32).tiny)
        worst, allowed = off.max().item(), TOLERANCE[received.dtype]
        if not worst <= allowed:
            what = "kernel" if grad is None else "gradient"
            return f"computed a wrong {what} (off by {worst:.1e}, where {allowed:.0e} is rounding)"
    return None


def _by_torch(name: str, fields: tuple[Any, ...], groups: int, grad: Tensor | None) -> Any:
    """The kernel, or with `grad` the gradients, by torch's operations; None in the place of what has no gradient."""
    if grad is None:
        return _composed(name, fields, groups)
    with torch.enable_grad():
        own = _each(fields, lambda t: t.detach().requires_grad_())
        learned = [isinstance(t, Tensor) and not (name == "orepa" and i == _COSINES) for i, t in enumerate(own)]
        inputs = [t for t, is_learned in zip(own, learned) if is_learned]
        found = iter(torch.autograd.grad(_composed(name, own, groups), inputs, grad))
    return tuple(next(found) if is_learned else None for is_learned in learned)


def _composed(name: str, fields: tuple[Any, ...], groups: int) -> Tensor:
    if name == "orepa":
        return _torch.orepa(Orepa(*fields), groups)
    taps, D = fields
    return _torch.depthwise(taps, D, groups)


def _each(fields: tuple[Any, ...], change: Any) -> tuple[Any, ...]:
    return tuple(change(t) if isinstance(t, Tensor) else t for t in fields)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
