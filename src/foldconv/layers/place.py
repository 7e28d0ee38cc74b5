"""`NormPlace`: where a norm was before a `BranchedConv` took it in.

Who still speaks to the norm at its old place is passed on: its mode, flags and parameters are those of the norms inside
the layer, its tensors and numbers those of the one that was taken in, and a plain checkpoint finds it there.

While torch runs eagerly the place must get what the layer gave, for the norm is applied already (`Handover`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Kernel, kernel_of, kernel_rule
from ..algebra.norms import is_norm, scale_and_shift
from ..ops import is_recorded
from .borrowed import Borrowed
from .foldable import as_a_call
from .handover import Handover, Unplaced

_OF_ALL = ("eps", "momentum", "track_running_stats")
_OF_THE_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "num_features", "affine")


class NormPlace(Borrowed):
    """Where a norm was before a `BranchedConv` took it in: passes on what it gets (to the norm's activation, if any).

    Args:
        layer: the layer that has the norm now.
        norm: the norm, for its class and its place in the state dict after folding.
        rest: what the norm's module did besides: its activation, or ``nn.Identity()``.

    Raises:
        UnsupportedError: from a forward in eager mode that gets another tensor than the layer gave, naming both.

    Example:
        >>> import foldconv
        >>> net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
        >>> place = foldconv.expand(net, "repvgg")[1]
        >>> place.weight.shape, [m.training for m in place.eval().norms()]
        (torch.Size([4]), [False, False])
    """

    held_in = ("norm", "norm")

    def __init__(self, layer: Any, norm: nn.Module, rest: nn.Module):
        super().__init__()
        self.rest = rest
        # In a list: neither the layer nor the norm is a child, and both are found again in copies.
        self.link: list[Any] = [layer, norm]
        self.handover = layer.handover = Handover()
        self.handover.place = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.handover.place() is None:  # else this is a shallow copy
            self.handover.place = weakref.ref(self)

    def forward(self, input: Tensor) -> Tensor:
        """What came after the norm."""
        if torch.compiler.is_compiling():
            # The layer may be one that the compiler leaves out.
            return self.rest(input.as_subclass(Tensor) if isinstance(input, Unplaced) else input)
        if type(input) is Unplaced or (type(input) is Tensor and not is_recorded()):
            return self.rest(self.handover.take(self, input))
        traced = as_a_call(self, input, (), {})
        return self.rest(input) if traced is None else traced

    # ------------------------------------------------------------------ the norm, for who looks for it here

    def norms(self) -> list[Any]:
        """All norms inside the layer."""
        return [module for module in self.link[0].body.modules() if is_norm(module)]

    @property
    def norm(self) -> Any:
        """The norm that the layer took in."""
        return self.link[0].own_norm

    def train(self, mode: bool = True) -> NormPlace:
        """Set the mode of the layer's norms, as of this place."""
        for norm in self.norms():
            norm.train(mode)
        return super().train(mode)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the layer's norms too, for who freezes or groups them by this place."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if recurse:
            for number, norm in enumerate(self.norms()):
                yield from norm.named_parameters(f"{prefix}.{number}" if prefix else str(number))

    def reset_running_stats(self) -> None:
        """Of the layer's norms."""
        for norm in self.norms():
            norm.reset_running_stats()

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ALL or name in _OF_THE_NORM:
            return getattr(self.norm, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_ALL:
            for norm in self.norms():
                setattr(norm, name, value)
        elif name in _OF_THE_NORM:
            setattr(self.norm, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        plain = {key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] in _OF_THE_NORM}
        if plain:
            # The checkpoint of the plain network: the layer loads its convolution, and this its norm.
            self.norm._load_from_state_dict({key: state_dict[key] for key in plain}, prefix, *args)
            for key in plain:
                del state_dict[key]
            for name in ("drop", "act"):
                if getattr(self.link[1], name, None) is self.rest:
                    for key in [key for key in state_dict if key.startswith(f"{prefix}{name}.")]:
                        state_dict[f"{prefix}rest.{key[len(prefix) + len(name) + 1 :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fuse(self) -> nn.Module:
        """What came after the norm: timm's ``reparameterize_model`` puts this here, and the layer's fold there."""
        return self.rest

    # ------------------------------------------------------------------ the fold

    def restore(self, kernel: Kernel, norm: Any = None) -> tuple[Kernel, Any]:
        """A kernel without bias and a norm after it that compute `kernel` together.

        The norm keeps its class, flags and dtype; its statistics become those of a norm that only shifts.

        Args:
            kernel: of the layer.
            norm: a copy of the norm, to be changed, in which nothing computes its weights; None: a copy is made.
        """
        layer, norm = self.link[0], copy.deepcopy(self.link[1]) if norm is None else norm
        # The layer has moved with the model since; the norm it was built from may not have.
        # Other people's fusers may have taken it away.
        like = getattr(self.norm, "running_var", None)
        like = layer.conv.weight if like is None else like
        norm = norm.to(like.device, like.dtype)
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


@kernel_rule(NormPlace)
def _place(place: NormPlace, channels: int, ndim: int) -> Kernel:
    return kernel_of(place.rest, in_channels=channels, ndim=ndim)
