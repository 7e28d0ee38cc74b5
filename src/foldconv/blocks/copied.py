"""Blocks whose code is copied from project to project, known by their attributes; a run beside the fold is the proof.

`rbr_dense` beside `rbr_1x1` is RepVGG's original and its copies: YOLOv6's RepVGGBlock and QARepVGGBlock, YOLOv7's
RepConv. `branch_3x3` beside `branch_1x1` is super-gradients' (RepVGG, and QARepVGG in YOLO-NAS) and OpenMMLab's.
`rbr_conv` beside `rbr_scale` is MobileOne's original, `branch_conv_list` beside `branch_scale` OpenMMLab's.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ._recipes import Times, chain, conv_norm, convolution, edited, of_attributes, total


@of_attributes("rbr_dense", "rbr_1x1", "rbr_identity", reads=("rbr_dense",))
def rbr(block: Any) -> nn.Module | None:
    """RepVGG's original, YOLOv6, YOLOv7's RepConv: branches ``rbr_dense``, ``rbr_1x1`` and ``rbr_identity``."""
    if "rbr_reparam" in block._modules:
        return None
    average = getattr(block, "rbr_avg", None)
    tree: nn.Module = total(_branch(block.rbr_dense), _branch(block.rbr_1x1), block.rbr_identity, average)
    changes: dict[str, Any] = {"deploy": True} if hasattr(block, "deploy") else {}
    # QARepVGG has a norm behind the sum, and its original keeps it there.
    if isinstance(block._modules.get("bn"), nn.Module) and isinstance(getattr(block, "se", None), nn.Identity):
        tree = chain(tree, block.bn)
        changes["bn"] = nn.Identity()
    gone = ("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_avg", "id_tensor")
    return edited(block, gone, rbr_reparam=convolution(tree), **changes)


@of_attributes("branch_3x3", "branch_1x1", "alpha", "post_bn", "identity", reads=("branch_3x3",))
def qa_rep_vgg(block: Any) -> nn.Module:
    """super-gradients' QARepVGG (YOLO-NAS): only the 3×3 branch has a norm, one more follows the sum."""
    point = chain(block.branch_1x1, Times(block.alpha))
    identity = None if block.identity is None else nn.Identity()
    tree = chain(total(block.branch_3x3, point, identity), block.post_bn)
    return edited(
        block,
        ("branch_3x3", "branch_1x1", "alpha", "post_bn", "identity", "id_tensor"),
        rbr_reparam=convolution(tree),
        partially_fused=False,
        fully_fused=True,
    )


@of_attributes("rbr_reparam", "post_bn", "partially_fused", "fully_fused", reads=("rbr_reparam",))
def partly_fused(block: Any) -> nn.Module | None:
    """super-gradients' QARepVGG of which the branches are folded and the norm behind them is not."""
    if block.fully_fused or not block.partially_fused:
        return None
    conv = convolution(chain(block.rbr_reparam, block.post_bn))
    return edited(block, ("post_bn",), rbr_reparam=conv, partially_fused=False, fully_fused=True)


@of_attributes("branch_3x3", "branch_1x1", "alpha", "no_conv_branch", reads=("branch_3x3",))
def rep_vgg(block: Any) -> nn.Module:
    """super-gradients' RepVGG, whose 1×1 branch has a factor."""
    tree = total(block.branch_3x3, chain(block.branch_1x1, Times(block.alpha)), block.no_conv_branch)
    return edited(
        block,
        ("branch_3x3", "branch_1x1", "alpha", "no_conv_branch", "id_tensor"),
        rbr_reparam=convolution(tree),
        build_residual_branches=False,
    )


@of_attributes("branch_3x3", "branch_1x1", "deploy", reads=("branch_3x3",))
def mm_rep_vgg(block: Any) -> nn.Module:
    """OpenMMLab's RepVGG, whose identity is ``branch_norm`` or ``branch_identity``."""
    identity = getattr(block, "branch_norm", None) or getattr(block, "branch_identity", None)
    tree = total(_branch(block.branch_3x3), _branch(block.branch_1x1), identity)
    gone = ("branch_3x3", "branch_1x1", "branch_norm", "branch_identity")
    return edited(block, gone, branch_reparam=convolution(tree), deploy=True)


@of_attributes("branch_conv_list", "branch_scale", "branch_norm", "deploy", reads=("branch_conv_list",))
def mm_mobile_one(block: Any) -> nn.Module:
    """OpenMMLab's MobileOne."""
    tree = total(*map(_branch, block.branch_conv_list), _branch(block.branch_scale), block.branch_norm)
    gone = ("branch_conv_list", "branch_scale", "branch_norm")
    return edited(block, gone, branch_reparam=convolution(tree), deploy=True)


@of_attributes("rbr_conv", "rbr_scale", "rbr_skip", "inference_mode", reads=("rbr_conv", "rbr_scale", "rbr_skip"))
def mobile_one(block: Any) -> nn.Module:
    """MobileOne's original: branches ``rbr_conv``, ``rbr_scale`` and ``rbr_skip``."""
    tree = total(*map(_branch, block.rbr_conv or ()), _branch(block.rbr_scale), block.rbr_skip)
    gone = ("rbr_conv", "rbr_scale", "rbr_skip", "id_tensor")
    return edited(block, gone, reparam_conv=convolution(tree), inference_mode=True)


def _branch(branch: Any) -> nn.Module | None:
    """A branch, or the convolution and the norm inside it where a project has a class of its own for the two."""
    if branch is None or type(branch).forward is nn.Sequential.forward or "conv" not in branch._modules:
        return branch
    return conv_norm(branch)
