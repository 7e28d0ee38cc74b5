"""timm's blocks that timm itself folds: what ``reparameterize_model`` does to them, exactly and in any precision.

Written for timm 1.0; the state dicts are those of timm's own folds. Where a block's ``forward`` asks for a folded
convolution (``reparam_conv``), the block stays and holds it there; a block that is linear throughout is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..algebra.norms import is_norm
from ..errors import UnsupportedError
from ._recipes import (
    Times,
    chain,
    conv_norm,
    convolution,
    edited,
    linear,
    linear_values,
    norm_alone,
    of_class,
    realized_linear,
    total,
)

_MODELS = "timm.models."

# ---------------------------------------------------------------------- byobnet: RepVGG and MobileOne


@of_class(_MODELS + "byobnet.RepVggBlock")
def rep_vgg(block: Any) -> nn.Module | None:
    """RepVGG: k×k and 1×1 convolutions and the identity, each with a norm."""
    if block.reparam_conv is not None:
        return None
    tree = total(conv_norm(block.conv_kxk), conv_norm(block.conv_1x1), norm_alone(block.identity))
    return edited(block, ("conv_kxk", "conv_1x1", "identity", "drop_path"), reparam_conv=convolution(tree))


@of_class(
    _MODELS + "byobnet.MobileOneBlock",
    _MODELS + "fastvit.MobileOneBlock",
    reads=("conv_kxk", "conv_scale", "identity"),
)
def mobile_one(block: Any) -> nn.Module | None:
    """MobileOne: copies of a convolution, a 1×1 one and the identity, each with a norm."""
    if block.reparam_conv is not None:
        return None
    changes = {"inference_mode": True} if hasattr(block, "inference_mode") else {}
    return edited(
        block,
        ("conv_kxk", "conv_scale", "identity", "drop_path"),
        reparam_conv=convolution(_mobile_one(block)),
        **changes,
    )


def _mobile_one(block: Any) -> nn.Module:
    if block.reparam_conv is not None:
        return block.reparam_conv
    scale = None if block.conv_scale is None else conv_norm(block.conv_scale)
    return total(*(conv_norm(branch) for branch in block.conv_kxk or ()), scale, norm_alone(block.identity))


# ---------------------------------------------------------------------- FastViT


@of_class(_MODELS + "fastvit.ReparamLargeKernelConv")
def large_kernel(block: Any) -> nn.Module | None:
    """RepLKNet: a large and a small convolution, each with a norm."""
    if block.reparam_conv is not None:
        return None
    small = getattr(block, "small_conv", None)
    tree = total(conv_norm(block.large_conv), None if small is None else conv_norm(small))
    return edited(block, ("large_conv", "small_conv"), reparam_conv=convolution(tree))


@of_class(_MODELS + "fastvit.RepMixer")
def rep_mixer(block: Any) -> nn.Module | None:
    """RepMixer: ``x + γ·(mixer(x) - norm(x))``."""
    if block.reparam_conv is not None:
        return None
    mixer, norm = _linear_part(block.mixer), _linear_part(block.norm)
    gamma = getattr(block.layer_scale, "gamma", None)
    difference = total(mixer, chain(norm, Times(-1)))
    tree = total(chain(difference, None if gamma is None else Times(gamma)), nn.Identity())
    return edited(block, ("mixer", "norm", "layer_scale"), reparam_conv=convolution(tree), inference_mode=True)


def _linear_part(block: Any) -> nn.Module:
    for other in (block.se, block.act):
        if not isinstance(other, nn.Identity):
            raise UnsupportedError(f"{type(block).__name__} applies {type(other).__name__}, which no convolution can")
    return _mobile_one(block)


@of_class(_MODELS + "fastvit.RepConditionalPosEnc")
def positional_encoding(block: Any) -> nn.Module | None:
    """A depthwise convolution and the identity."""
    if block.reparam_conv is not None:
        return None
    tree = total(block.pos_enc, nn.Identity())
    return edited(block, ("pos_enc",), reparam_conv=convolution(tree))


# ---------------------------------------------------------------------- RepGhost


@of_class(_MODELS + "repghost.RepGhostModule", reads=("primary_conv",))
def rep_ghost(block: Any) -> nn.Module | None:
    """RepGhost: a depthwise convolution and the identity, each with a norm, behind the primary convolution."""
    if not len(block.fusion_conv) and not len(block.fusion_bn):
        return None
    fusion = [chain(conv, norm) for conv, norm in zip(block.fusion_conv, block.fusion_bn)]
    conv = convolution(total(block.cheap_operation, *fusion))
    return edited(block, ("fusion_conv", "fusion_bn"), cheap_operation=conv, fusion_conv=[], fusion_bn=[])


# ---------------------------------------------------------------------- GhostNetV3, PP-LCNetV2


@of_class(_MODELS + "ghostnet.GhostModuleV3", reads=("primary_rpr_conv",))
def ghost_v3(block: Any) -> nn.Module | None:
    """GhostNetV3: copies of the primary convolution; of the cheap one, beside a 1×1 one and the identity."""
    if block.infer_mode:
        return None
    primary = _ghost(block.primary_rpr_conv, block.primary_rpr_scale, block.primary_rpr_skip)
    cheap = _ghost(block.cheap_rpr_conv, block.cheap_rpr_scale, block.cheap_rpr_skip)
    return edited(
        block,
        _rpr("primary") + _rpr("cheap"),
        primary_conv=nn.Sequential(convolution(primary), block.primary_activation),
        cheap_operation=nn.Sequential(convolution(cheap), block.cheap_activation),
        infer_mode=True,
    )


@of_class(_MODELS + "ghostnet.GhostBottleneckV3", reads=("ghost1",))
def ghost_v3_bottleneck(block: Any) -> nn.Module | None:
    """GhostNetV3: copies of a depthwise convolution and a 1×1 one between two modules."""
    if block.infer_mode or block.stride == 1:
        return None
    conv = convolution(_ghost(block.dw_rpr_conv, block.dw_rpr_scale, block.dw_rpr_skip))
    return edited(block, _rpr("dw"), conv_dw=conv, bn_dw=nn.Identity(), infer_mode=True)


def _ghost(convs: Any, scale: Any, skip: Any) -> nn.Module:
    branches = [*convs] if scale is None else [*convs, scale]
    return total(*(conv_norm(branch, norm="bn1") for branch in branches), norm_alone(skip))


def _rpr(part: str) -> tuple[str, ...]:
    return tuple(f"{part}_rpr_{name}" for name in ("conv", "scale", "skip"))


@of_class(_MODELS + "lcnetv2.RepDepthwiseSeparable")
def lcnet_v2(block: Any) -> nn.Module | None:
    """PP-LCNetV2: depthwise convolutions of several sizes, each with a norm."""
    if block.dw_conv_list is None:
        return None
    conv = convolution(total(*(conv_norm(branch) for branch in block.dw_conv_list)))
    return edited(block, ("dw_conv_list",), dw_conv=conv, dw_conv_list=None)


# ---------------------------------------------------------------------- EfficientViM


@of_class(_MODELS + "efficientvim.ConvLayer1d", _MODELS + "efficientvim.ConvLayer2d")
def conv_layer(block: Any) -> nn.Module | None:
    """EfficientViM's convolution with its norm."""
    if not is_norm(block.norm):
        return None
    return edited(block, conv=convolution(chain(block.conv, block.norm)), norm=None)


@of_class(_MODELS + "efficientvim.PatchMerging", reads=("dwconv1",))
def patch_merging(block: Any) -> nn.Module | None:
    """EfficientViM: depthwise convolutions with their norms, beside the identity."""
    return None if block.fused else _depthwise(block, None, None)


@of_class(_MODELS + "efficientvim.EfficientViMBlock", reads=("dwconv1",))
def efficient_vim(block: Any) -> nn.Module | None:
    """EfficientViM: depthwise convolutions with their norms, mixed with the identity by gates."""
    if block.fused:
        return None
    alpha = block.alpha.double().sigmoid()
    return _depthwise(block, alpha[0], alpha[2])


def _depthwise(block: Any, *gates: Any) -> nn.Module:
    changes: dict[str, Any] = {}
    for name, gate in zip(("dwconv1", "dwconv2"), gates):
        branch = conv_norm(getattr(block, name), norm="norm")
        if gate is None:
            tree = total(branch, nn.Identity())
        else:
            tree = total(chain(branch, Times(gate)), chain(nn.Identity(), Times(1 - gate)))
        changes |= {f"{name}__conv": convolution(tree), f"{name}__norm": None}
    return edited(block, fused=True, **changes)


# ---------------------------------------------------------------------- Next-ViT: norms in front


@of_class(_MODELS + "nextvit.NextConvBlock")
def next_conv(block: Any) -> nn.Module | None:
    """Next-ViT: the norm in front of the first pointwise convolution."""
    if block.is_fused:
        return None
    fc1 = convolution(chain(block.norm, block.mlp.fc1))
    return edited(block, mlp__fc1=fc1, norm=nn.Identity(), is_fused=True)


@of_class(_MODELS + "nextvit.NextTransformerBlock")
def next_transformer(block: Any) -> nn.Module | None:
    """Next-ViT: the norms in front of queries, keys and values, and of the first pointwise convolution."""
    if block.is_fused:
        return None
    attention = block.e_mhsa
    # Keys and values are of averages, which a norm and a linear layer commute with.
    norms = (block.norm1,) if attention.norm is None else (block.norm1, attention.norm)
    return edited(
        block,
        e_mhsa__q=linear(attention.q, (block.norm1,)),
        e_mhsa__k=linear(attention.k, norms),
        e_mhsa__v=linear(attention.v, norms),
        e_mhsa__norm=None if attention.norm is None else nn.Identity(),
        norm1=nn.Identity(),
        mlp__fc1=convolution(chain(block.norm2, block.mlp.fc1)),
        norm2=nn.Identity(),
        is_fused=True,
    )


# ---------------------------------------------------------------------- convolution and norm as one class


@of_class(
    _MODELS + "repvit.ConvNorm",
    _MODELS + "tiny_vit.ConvNorm",
    _MODELS + "efficientvit_msra.ConvNorm",
    _MODELS + "shvit.Conv2dNorm",
    _MODELS + "iformer.ConvNorm",
)
def sequence(block: Any) -> nn.Module:
    """A convolution and its norm in an ``nn.Sequential``."""
    return convolution(block)


@of_class(_MODELS + "levit.ConvNorm")
def levit_conv(block: Any) -> nn.Module:
    """LeViT's convolution and its norm."""
    return convolution(conv_norm(block, "linear"))


@of_class(_MODELS + "levit.LinearNorm")
def linear_norm(block: Any) -> nn.Module:
    """A linear layer and its norm."""
    return linear(block.linear, after=(block.bn,))


@of_class(
    _MODELS + "levit.NormLinear",
    _MODELS + "efficientvit_msra.NormLinear",
    _MODELS + "repvit.NormLinear",
    _MODELS + "shvit.NormLinear",
    _MODELS + "iformer.NormLinear",
)
def norm_linear(block: Any) -> nn.Module:
    """A classifier with a norm in front."""
    return linear(block._modules.get("linear") or block.l, before=(block.bn,))


@of_class(_MODELS + "repvit.RepVitClassifier", _MODELS + "iformer.RepVitClassifier")
def two_heads(block: Any) -> nn.Module | None:
    """The mean of one or two classifiers."""
    if isinstance(block.head, nn.Identity):
        return None
    heads = [block.head, block.head_dist] if block.distillation else [block.head]
    values = [linear_values(head.l, (head.bn,), ()) for head in heads]
    weight, bias = (torch.stack(part).mean(0) for part in zip(*values))
    return realized_linear(weight, bias, block.head.l)


# ---------------------------------------------------------------------- RepViT, SHViT, iFormer: depthwise and identity


@of_class(_MODELS + "repvit.RepVggDw")
def depthwise_rep_vgg(block: Any) -> nn.Module:
    """RepViT: depthwise k×k and 1×1 convolutions and the identity, with a norm behind the sum or inside."""
    return convolution(chain(total(block.conv, block.conv1, nn.Identity()), block.bn))


@of_class(_MODELS + "shvit.Residual")
def residual(block: Any) -> nn.Module | None:
    """SHViT's depthwise convolution with its norm, beside the identity."""
    if type(block.m).__name__ != "Conv2dNorm":
        return None
    return convolution(total(block.m, nn.Identity()))


@of_class(_MODELS + "iformer.RepCPE")
def iformer_encoding(block: Any) -> nn.Module:
    """iFormer's positional encoding: a depthwise convolution with its norm, beside the identity."""
    conv, gamma = block.cpe.module, block.cpe.gamma
    scaled = conv if gamma is None else chain(conv, Times(gamma))
    return convolution(total(scaled, nn.Identity()))
