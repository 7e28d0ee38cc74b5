"""`Written`: a composed kernel that tells its layer what is written into it: a ``weight`` that is no silent copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Written(Tensor):
    """A composed kernel, and views of it; after an operation in place the layer composes what stands there then.

    What else is computed from it is an ordinary tensor, with its gradients. An array of NumPy that shares its memory is
    out of sight.
    """

    _layer: Any
    _whole: Tensor

    @classmethod
    def of(cls, layer: Any, kernel: Tensor) -> Tensor:
        """The kernel of a layer, watched; `layer` needs ``start_from``."""
        return cls._view(kernel, layer, kernel)

    @classmethod
    def _view(cls, tensor: Tensor, layer: Any, whole: Tensor) -> Tensor:
        found: Any = tensor.as_subclass(cls)
        found._layer, found._whole = layer, whole
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function as on an ordinary tensor, then pass on what it wrote."""
        kwargs = kwargs or {}
        flat = [*args, *kwargs.values()]
        flat += [item for value in flat if isinstance(value, (list, tuple)) for item in value]
        ours: list[Any] = [value for value in flat if isinstance(value, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            if ours and func == Tensor.data.__set__ and args[0] is ours[0]:  # pyright: ignore
                ours[0]._layer.start_from(torch.as_tensor(args[1]))
                return func(*args, **kwargs)
            before = [_version(value) for value in ours]
            result = func(*args, **kwargs)
            for value, version in zip(ours, before):
                if _version(value) != version:
                    value._layer.start_from(value._whole)
            if ours and isinstance(result, Tensor) and _shares(result, ours[0]) and type(result) is Tensor:
                return cls._view(result, ours[0]._layer, ours[0]._whole)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        """An ordinary tensor with these values."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().as_subclass(Tensor).clone()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _shares(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or a.layout is not torch.strided:
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
