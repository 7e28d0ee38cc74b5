"""What a normalization layer computes in evaluation mode: ``y = scale·x + shift`` per channel.

The one place that knows, for every norm class; absorbing a norm anywhere goes through `scale_and_shift`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .. import formulas
from ..errors import UnsupportedError

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Norms of other people's libraries, by class name so that none of them is imported: same attributes, other forward.
_OTHERS = {"_BatchNormXd"}  # what mmengine makes of SyncBatchNorm on one device
_FROZEN = {"FrozenBatchNorm2d", "FrozenBatchNorm3d"}
_WITH_ACTIVATION = {"BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"}
_REFUSED = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def is_norm(module: nn.Module) -> bool:
    """Can `scale_and_shift` describe this module (its norm part, if it also has an activation)?"""
    return type(module) in _BATCH_NORMS or type(module).__name__ in _FROZEN | _WITH_ACTIVATION | _OTHERS


def is_statistical_norm(module: nn.Module) -> bool:
    """Does the module normalize by statistics of its own input, even in evaluation mode?"""
    return isinstance(module, _REFUSED) and not is_norm(module)


def after_norm(module: nn.Module) -> nn.Module:
    """What remains of a norm layer once the norm is absorbed: nothing, or its dropout and activation.

    Example:
        >>> after_norm(nn.BatchNorm2d(3))
        Identity()
    """
    if type(module).__name__ not in _WITH_ACTIVATION:
        return nn.Identity()
    rest = [
        m
        for m in (getattr(module, "drop", None), getattr(module, "act", None))
        if m is not None and not isinstance(m, nn.Identity)
    ]
    return nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)


def norm_only(module: Any) -> Any:
    """The norm of a norm-and-activation module, as a plain batch norm that shares its tensors; others as they are.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> norm_only(norm) is norm
        True
    """
    if type(module).__name__ not in _WITH_ACTIVATION:
        return module
    if not hasattr(module, "momentum"):  # a frozen one learns nothing, and stays what it is
        bare = copy.copy(module)
        vars(bare)["_modules"] = {name: nn.Identity() for name in module._modules}
        return bare
    cls = nn.SyncBatchNorm if isinstance(module, nn.SyncBatchNorm) else nn.BatchNorm2d
    plain = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    plain._parameters.update(module._parameters)
    plain._buffers.update(module._buffers)
    return plain.train(module.training)


def scale_and_shift(norm: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """``(scale, shift)``, each of shape ``(channels,)``: the evaluation-mode function of a norm.

    Raises:
        UnsupportedError: for a norm without running statistics, whose function depends on its input.

    Example:
        >>> scale, shift = scale_and_shift(nn.BatchNorm2d(1, eps=0.0))
        >>> scale.item(), shift.item()
        (1.0, 0.0)
    """
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or var is None:
        raise UnsupportedError(
            f"{type(norm).__name__} keeps no running statistics (track_running_stats=False), so even in evaluation "
            "mode its function depends on the batch; train it with track_running_stats=True to fold it"
        )
    gamma, beta = (None if t is None else t.to(dtype) for t in (getattr(norm, n, None) for n in ("weight", "bias")))
    return formulas.norm(gamma, beta, mean.to(dtype), var.to(dtype), norm.eps)  # pyright: ignore
