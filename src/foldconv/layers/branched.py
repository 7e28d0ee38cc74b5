"""`BranchedConv`: a convolution and its norm, trained as parallel branches with norms of their own.

The norm inside a branch uses the batch while training, so the branches run on feature maps; only the evaluation
function is linear, and that is what folds. The branches are ordinary modules in a tree of `Sum` and
``nn.Sequential``; `kernel_of` folds the tree, so a method says only which branches there are.

The norm that followed the convolution moves into the main branch. `NormPlace` keeps its place in the network, so
that folding can put a norm back and the folded network has the keys of the original.

In evaluation mode nothing needs the branches apart, so one convolution runs (`BranchTree`). Invariants, in the order
in which they are decided:

1. The branches run in training mode; where any module of the body is in training mode; where gradients are wanted of
   the body's parameters; where a compiler, tracer, function transform, dispatch mode or CUDA graph records; where a
   hook looks at a module of the body, or its forward was replaced; where the body has no exact kernel.
2. Any other forward composes the kernel only when the body changed since the last time: another module, another
   parameter or buffer (running statistics are buffers), another version counter or storage of one, another eps.
3. What a version counter cannot see mostly comes with ``train()``/``eval()``, ``to()`` or ``load_state_dict()`` of the
   layer, each of which drops the kept convolution. The rest, ``p.data.add_(...)`` between two forwards in evaluation
   mode and nothing of the above, nobody can see: call ``forget()`` or ``eval()`` after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..algebra import Kernel, kernel_of
from ..algebra.convolutions import CONVOLUTIONS
from ..algebra.norms import is_norm, scale_and_shift
from ..algebra.rules import conv_geometry
from ..errors import UnsupportedError
from ..ops import is_recorded
from .foldable import Foldable, realize_like
from .terms import terms_of

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_PADS = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


class BranchTree(Foldable):
    """A layer that is a tree of modules, its ``body``: run as it is while training, as one convolution to evaluate.

    When the convolution is composed and when the body runs: see the invariants at the top of this file.
    """

    body: nn.Module

    _kept: _Kept | None = None
    """The convolution that the body computes in evaluation mode, and the state in which the body computed it."""

    def forward(self, input: Tensor) -> Tensor:
        """The body's function of `input`; shapes as in the convolution."""
        plain = None if self.training or is_recorded() else self._plain(input)
        return self.body(input) if plain is None else plain(input)

    def feature_forward(self, input: Tensor) -> Tensor:
        """Run the body."""
        return self.body(input)

    def branch_kernels(self, dtype: torch.dtype = torch.float64) -> dict[str, Kernel]:
        """The branches of the body (`terms_of`)."""
        return terms_of(self.body, self.to_kernel(dtype))

    def forget(self) -> None:
        """Drop the kept convolution: the next forward in evaluation mode composes anew."""
        self._kept = None

    def _plain(self, input: Tensor) -> nn.Module | None:
        """The convolution to run instead of the body; None where the body has to run."""
        body = self.body
        if torch.is_grad_enabled() and any(p.requires_grad for p in body.parameters()):
            return None
        # What is composed under a dispatch mode may be a stand-in; fx hands in another kind of stand-in.
        if not isinstance(input, Tensor) or torch._C._len_torch_dispatch_stack() or all_are_watched():
            return None
        # A CUDA graph replays with the parameters of then.
        if input.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        kept = self._kept
        if kept is None or not kept.is_of(body):
            kept = self._kept = _Kept(self)
        return kept.plain

    def _apply(self, *args: Any, **kwargs: Any):
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            self.forget()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        # Neither a pickle nor a copy carries the kept convolution.
        return {k: v for k, v in self.__dict__.items() if k != "_kept"}


class _Kept:
    """What a `BranchTree` computes in evaluation mode: a plain convolution, or None where the body has to run.

    It knows the state of the body in which that was so; it is no module, so that nothing finds its parameters.
    """

    def __init__(self, layer: BranchTree):
        self.modules = list(layer.body.modules())
        self.contents = _contents(self.modules)
        self.ids, self.flags = [id(x) for x in self.contents], _flags(self.modules)
        self.tensors: list[Tensor] = []
        self.versions: list[tuple[int, int]] = []
        self.plain: nn.Module | None = None
        tensors = [x for x in self.contents if isinstance(x, Tensor)]
        if not any(training or strange for training, _, strange in self.flags) and self._can_keep(tensors):
            self.plain = _composed(layer, tensors[0].device)
            self.tensors, self.versions = tensors, _versions(tensors)

    def is_of(self, body: nn.Module) -> bool:
        """Is the body as it was?"""
        return (
            body is self.modules[0]
            and [id(x) for x in _contents(self.modules)] == self.ids
            and _flags(self.modules) == self.flags
            and _versions(self.tensors) == self.versions
        )

    def _can_keep(self, tensors: list[Tensor]) -> bool:
        parameters = [p for m in self.modules for p in m._parameters.values() if p is not None]
        return (
            len(_types(self.modules)) == 1
            and len({t.device for t in tensors}) == 1
            # MPS has no float64, in which norms are folded.
            and tensors[0].device.type not in ("meta", "mps")
            # Functional calls, replicas and sharding put other tensors in a parameter's place or beside it.
            and all(type(p) is nn.Parameter for p in parameters)
            and not any(t.is_inference() for t in tensors)
            and not any(isinstance(value, Tensor) for m in self.modules for value in vars(m).values())
            and not any("parametrizations" in m._modules for m in self.modules)
        )


def _composed(layer: BranchTree, device: torch.device) -> nn.Module | None:
    """The plain convolution of a layer's evaluation function, composed in float32 at least."""
    (dtype,) = _types(layer.body.modules())
    # Outside inference mode, so that what is kept may serve a later forward that records gradients of its input.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            kernel = layer.to_kernel(torch.promote_types(dtype, torch.float32))
        except UnsupportedError:
            return None
        return layer.realize(kernel).to(dtype).requires_grad_(False)


def _types(modules: Iterable[nn.Module]) -> set[torch.dtype]:
    """The types of the convolutions; a norm may have another one."""
    return {p.dtype for m in modules if not is_norm(m) for p in m._parameters.values() if p is not None}


def _contents(modules: list[nn.Module]) -> list[Any]:
    return [x for m in modules for held in (m._modules, m._parameters, m._buffers) for x in held.values()]


def _flags(modules: list[nn.Module]) -> list[tuple[bool, Any, bool]]:
    return [(m.training, (own := vars(m)).get("eps"), "forward" in own or is_watched(m)) for m in modules]


def _versions(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return [(t._version, t.data_ptr()) for t in tensors]


def is_watched(m: nn.Module) -> bool:
    """Is there a hook on the module?"""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def all_are_watched() -> bool:
    """Is there a hook on every module of the process?"""
    return bool(torch_module._has_any_global_hook())


class BranchedConv(BranchTree):
    """A tree of branches in the place of a convolution.

    Args:
        body: the branches, a tree that `kernel_of` understands.
        conv: the convolution of the main branch, itself in `body`; the fold takes its arguments and layout.
        method: the config that built the body.

    Raises:
        UnsupportedError: from `fold`, when the tree has no exact kernel.
    """

    def __init__(self, body: nn.Module, conv: nn.Module, method: Any):
        super().__init__()
        self.body = body
        self._path = next(name for name, module in body.named_modules() if module is conv)
        self._method = method

    @property
    def method(self) -> Any:
        """The config that rebuilds this layer."""
        return self._method

    @property
    def conv(self) -> Any:
        """The convolution of the main branch."""
        return self.body.get_submodule(self._path)

    @property
    def norm(self) -> Any:
        """The norm of the main branch, or None."""
        branch = self.body.get_submodule(self._path.rpartition(".")[0])
        return getattr(branch, "norm", None)

    def to_kernel(self, dtype: torch.dtype | None = torch.float64) -> Kernel:
        """The evaluation-mode kernel, in the main convolution's window."""
        return kernel_of(self.body, in_channels=self.conv.in_channels, ndim=len(self.conv.kernel_size), dtype=dtype)

    def realize(self, kernel: Kernel) -> nn.Module:
        """A plain convolution like the main branch's; of the kernel's own window, if somebody enlarged the body."""
        source = self.conv if kernel.weight.shape == self.conv.weight.shape else self
        return realize_like(source, kernel).train(self.training)


class NormPlace(nn.Module):
    """Where a norm was before a `BranchedConv` took it in: passes on what it gets (to the norm's activation, if any).

    Args:
        layer: the layer that has the norm now.
        norm: the norm, for its class and its place in the state dict after folding.
        rest: what the norm's module did besides: its activation, or ``nn.Identity()``.
    """

    def __init__(self, layer: BranchedConv, norm: nn.Module, rest: nn.Module):
        super().__init__()
        self.rest = rest
        # In a list: neither the layer nor the norm is a child, and both are found again in copies.
        self.link: list[Any] = [layer, norm]

    def forward(self, input: Tensor) -> Tensor:
        """What came after the norm."""
        return self.rest(input)

    def restore(self, kernel: Kernel) -> tuple[Kernel, Any]:
        """A kernel without bias and a norm after it that compute `kernel` together.

        The norm keeps its class, flags and dtype; its statistics become those of a norm that only shifts.
        """
        layer, norm = self.link[0], copy.deepcopy(self.link[1])
        # The layer has moved with the model since; the norm it was built from may not have.
        norm = norm.to(layer.norm.running_var.device, layer.norm.running_var.dtype)
        shift = torch.zeros_like(norm.running_mean) if kernel.bias is None else kernel.bias
        with torch.no_grad():
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            if norm.weight is not None:
                norm.weight.fill_(1)
            if norm.bias is not None:
                norm.bias.copy_(shift)
            else:
                norm.running_mean.copy_(-shift)
            # The statistics were rounded to the norm's type: what its scale really is, the kernel makes up for.
            scale, _ = scale_and_shift(norm)
        bias = None if layer.conv.bias is None else torch.zeros_like(kernel.weight[:, 0].flatten(1)[:, 0])
        return kernel.replace(bias=None).scale(1 / scale, bias), norm.train(self.training)


# ---------------------------------------------------------------------- what branches are made of


def branch_conv(
    conv: Any,
    kernel_size: Sequence[int],
    *,
    in_channels: int | None = None,
    out_channels: int | None = None,
    groups: int | None = None,
    dilation: Sequence[int] | None = None,
) -> nn.Sequential:
    """A convolution without bias whose window lies in the middle of `conv`'s, with `conv`'s stride and outputs.

    Padding is what is left of `conv`'s once the window is smaller; it can be negative (a crop), and is then a module
    of its own in front.

    Example:
        >>> branch_conv(nn.Conv2d(4, 8, 3, stride=2, padding=1), (1, 1))
        Sequential(
          (conv): Conv2d(4, 8, kernel_size=(1, 1), stride=(2, 2), bias=False)
        )
        >>> branch_conv(nn.Conv2d(4, 8, 3), (1, 1))
        Sequential(
          (crop): ZeroPad2d((-1, -1, -1, -1))
          (conv): Conv2d(4, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
        )
    """
    steps = tuple(conv.dilation if dilation is None else dilation)
    padding = inner_padding(conv, kernel_size, steps)
    own = all(before == after >= 0 for before, after in padding)
    inner = CONVOLUTIONS[len(kernel_size)](
        conv.in_channels if in_channels is None else in_channels,
        conv.out_channels if out_channels is None else out_channels,
        tuple(kernel_size),  # pyright: ignore[reportArgumentType]
        stride=conv.stride,
        padding=tuple(before for before, _ in padding) if own else 0,  # pyright: ignore[reportArgumentType]
        dilation=steps,  # pyright: ignore[reportArgumentType]
        groups=conv.groups if groups is None else groups,
        bias=False,
        padding_mode=conv.padding_mode if own and any(before for before, _ in padding) else "zeros",
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    layers = nn.Sequential()
    if not own:
        for name, module in padding_modules(padding, conv.padding_mode).items():
            layers.add_module(name, module)
    layers.add_module("conv", inner)
    return layers


def inner_padding(conv: Any, kernel_size: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """The padding of a smaller window in the middle of `conv`'s, per dimension ``(before, after)``."""
    geometry = conv_geometry(conv)
    padding = []
    for (before, after), k, d, size, step in zip(
        geometry["padding"], conv.kernel_size, conv.dilation, kernel_size, dilation
    ):
        spare = d * (k - 1) - step * (size - 1)
        # In whole steps of the outer dilation, so that the taps fall on taps.
        front = d * ((k - 1) // 2) - step * ((size - 1) // 2)
        padding.append((before - front, after - (spare - front)))
    return padding


def padding_modules(padding: Sequence[tuple[int, int]], mode: str) -> dict[str, nn.Module]:
    """Modules that pad by a mode and crop: ``pad`` and ``crop``, those that are needed."""
    ndim = len(padding)
    grow = tuple(max(n, 0) for pair in reversed(padding) for n in pair)
    crop = tuple(min(n, 0) for pair in reversed(padding) for n in pair)
    modules: dict[str, nn.Module] = {}
    if any(grow):
        modules["pad"] = _PADS[mode][ndim - 1](grow)
    if any(crop):
        modules["crop"] = _PADS["zeros"][ndim - 1](crop)
    return modules


def norm_like(norm: nn.Module | None, conv: Any, channels: int | None = None) -> nn.Module:
    """A new batch norm for a branch: `norm`'s eps, momentum and kind, `conv`'s rank, device and dtype."""
    cls = nn.SyncBatchNorm if isinstance(norm, nn.SyncBatchNorm) else _NORMS[len(conv.kernel_size)]
    momentum = getattr(norm, "momentum", 0.1)
    return cls(
        conv.out_channels if channels is None else channels,
        eps=getattr(norm, "eps", 1e-5),
        momentum=0.1 if momentum is None else momentum,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


def has_identity(conv: Any) -> bool:
    """Is there an identity branch: as many outputs as inputs, at the same positions?

    >>> has_identity(nn.Conv2d(4, 4, 3, padding=1)), has_identity(nn.Conv2d(4, 4, 3, stride=2, padding=1))
    (True, False)
    """
    same = all(
        before == after == 0 for before, after in inner_padding(conv, [1] * len(conv.kernel_size), conv.dilation)
    )
    return conv.in_channels == conv.out_channels and set(conv.stride) == {1} and same
