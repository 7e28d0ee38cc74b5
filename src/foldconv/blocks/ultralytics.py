"""ultralytics' blocks that its own ``model.fuse()`` folds, left in the state that ``fuse()`` leaves them in.

Written for ultralytics 8.4. Its fused blocks run another method, ``forward_fuse``, which stands on the instance as
``forward``; so it does here, and ``fuse()`` and export find nothing more to do.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ._recipes import conv_norm, convolution, edited, norm_alone, of_class, total

_CONV = "ultralytics.nn.modules.conv."


@of_class(_CONV + "Conv", _CONV + "DWConv")
def conv(block: Any) -> nn.Module | None:
    """A convolution, its norm and an activation."""
    return _fused(block, nn.Sequential(block.conv, block.bn), ("bn",)) if hasattr(block, "bn") else None


@of_class(_CONV + "Conv2")
def conv2(block: Any) -> nn.Module | None:
    """A k×k and a 1×1 convolution with one norm and an activation."""
    if not hasattr(block, "bn") or not hasattr(block, "cv2"):
        return None
    return _fused(block, nn.Sequential(total(block.conv, block.cv2), block.bn), ("bn", "cv2"))


@of_class(_CONV + "ConvTranspose")
def conv_transpose(block: Any) -> nn.Module | None:
    """A transposed convolution, its norm and an activation."""
    if not hasattr(block, "bn") or isinstance(block.bn, nn.Identity):
        return None
    return _fused(block, nn.Sequential(block.conv_transpose, block.bn), ("bn",), "conv_transpose")


@of_class(_CONV + "RepConv", reads=("conv1",))
def rep_conv(block: Any) -> nn.Module | None:
    """A 3×3 and a 1×1 convolution and, perhaps, the identity, each with a norm."""
    if not hasattr(block, "conv1"):
        return None
    tree = total(conv_norm(block.conv1), conv_norm(block.conv2), norm_alone(block.bn))
    return _fused(block, tree, ("conv1", "conv2", "bn", "id_tensor"))


@of_class("ultralytics.nn.modules.block.RepVGGDW")
def rep_vgg_dw(block: Any) -> nn.Module | None:
    """A 7×7 and a 3×3 depthwise convolution, each with a norm."""
    if not hasattr(block, "conv1"):
        return None
    return _fused(block, total(conv_norm(block.conv), conv_norm(block.conv1)), ("conv1",))


def _fused(block: Any, tree: nn.Module, gone: tuple[str, ...], name: str = "conv") -> nn.Module:
    new = edited(block, gone, **{name: convolution(tree)})
    new.forward = new.forward_fuse
    return new
