"""OpenMMLab: ``import foldconv.mm`` registers layers, networks and a hook for configs to name; needs mmengine.

``custom_imports = dict(imports=["foldconv.mm"])`` imports it from a config. Then there are

* in ``MODELS``, the layers that are one convolution, by their names: ``conv_cfg=dict(type="DOConv2d")``. What mmcv and
  ``init_cfg`` draw is drawn into ``weight``; for OREPA that is the origin branch, as in its authors' code, and its
  large kernels are refused where their chain is too narrow for what is drawn;
* in ``MODELS``, networks expanded by any method, `expanded`: ``dict(type="FoldConvExpanded", method=..., model=...)``;
* in ``HOOKS``, `FoldHook`, which folds the checkpoints that a run ends with;
* in ``OPTIM_WRAPPER_CONSTRUCTORS``, `FoldConvOptimWrapperConstructor`, which spares what must not decay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only  # pyright: ignore[reportMissingImports]
from mmengine.hooks import CheckpointHook, Hook  # pyright: ignore[reportMissingImports]
from mmengine.model import is_model_wrapper  # pyright: ignore[reportMissingImports]
from mmengine.optim import DefaultOptimWrapperConstructor  # pyright: ignore[reportMissingImports]
from mmengine.registry import (  # pyright: ignore[reportMissingImports]
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.runner import save_checkpoint  # pyright: ignore[reportMissingImports]
from torch import nn

from .._arguments import expect_flags
from .._selection import Patterns
from ..algebra.convolutions import PLAIN
from ..files.folders import read_content
from ..files.native import load_exactly
from ..files.weights import take
from ..layers import ComposedConv, Foldable
from ..methods import Method, as_method, method_from_json
from ..methods._registry import Init
from ..network.expand import expand
from ..network.fold import fold
from ..network.tree import copy_of

SUFFIX = ".folded"
"""What a folded checkpoint's name has more than that of the checkpoint."""


@MODELS.register_module("FoldConvExpanded")
def expanded(
    model: Any,
    method: str | Mapping[str, Any] | Method,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    init: Init = "preserve",
    example_shape: Sequence[int] | None = None,
) -> nn.Module:
    """A network from a config, with its convolutions expanded: any method, statistical ones too.

    The network's own ``init_weights`` (and with it ``init_cfg``, pretrained weights included) runs first.

    Args:
        model: the config of the plain network, or the network.
        method: a name, or a dictionary of a name and options: ``dict(method="doconv", depth_multiplier=12)``.
        include, exclude, init: as in `foldconv.expand`.
        example_shape: the shape of a batch of images that the network takes, at least two of them, for networks whose
            data flow only a run shows; see `foldconv.expand`.

    Raises:
        NoMatchError, UnsupportedError: as `foldconv.expand`.

    Example:
        >>> import mmcv.cnn
        >>> cfg = dict(type="ConvModule", in_channels=3, out_channels=8, kernel_size=3, norm_cfg=dict(type="BN"))
        >>> net = MODELS.build(dict(type="FoldConvExpanded", method="orepa", model=cfg))
        >>> type(net.conv).__name__
        'OREPAConv2d'
    """
    net: Any = MODELS.build(model) if isinstance(model, Mapping) else model
    if hasattr(net, "init_weights"):
        net.init_weights()
    config = method_from_json(dict(method)) if isinstance(method, Mapping) else as_method(method)
    example = None if example_shape is None else torch.zeros(*example_shape)
    return expand(net, config, include=include, exclude=exclude, init=init, example_inputs=example, inplace=True)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class FoldConvOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's own, but what a method says must not decay (OREPA's scales, DGConv's gates) does not.

    ``paramwise_cfg`` keeps its meaning for all else; no ``decay_mult`` in it, of ``custom_keys`` neither, makes these
    decay. A parameter of two modules is taken once (``bypass_duplicate``), unless that is switched off.

    Example:
        >>> from mmengine.optim import build_optim_wrapper
        >>> cfg = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, weight_decay=1e-4))
        >>> cfg["constructor"] = "FoldConvOptimWrapperConstructor"
        >>> net = nn.Sequential(MODELS.build(dict(type="OREPAConv2d", in_channels=4, out_channels=8, kernel_size=3)))
        >>> groups = build_optim_wrapper(net, cfg).optimizer.param_groups
        >>> [group["params"][0].ndim for group in groups if group["weight_decay"] == 0]
        [2]
    """

    def __init__(self, optim_wrapper_cfg: Any, paramwise_cfg: Any = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        # Without any option, mmengine makes one group of all.
        self.paramwise_cfg = {"bypass_duplicate": True, **self.paramwise_cfg}

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """mmengine's groups of the module and all in it, one for each parameter."""
        super().add_params(params, module, *args, **kwargs)
        if isinstance(module, Foldable):
            exempt = {id(p) for name, p in module.named_parameters(recurse=False) if name in module.no_decay}
            for group in params:
                if id(group["params"][0]) in exempt:
                    group["weight_decay"] = 0.0


@HOOKS.register_module()
class FoldHook(Hook):
    """At the end of training, a folded file beside each checkpoint that is kept as the last or the best.

    ``epoch_9.pth`` gets ``epoch_9.folded.pth``, with the same ``meta``, for the network of the same config without
    expansion. What is folded is the checkpoint's ``state_dict``, which is the average where there is an ``EMAHook``.

    Args:
        batchnorm: also absorb batch norms, as `foldconv.fold`: a file for the network folded so.
        example_shape: as in `expanded`, for finding those norms.

    Raises:
        FoldMismatchError, UnsupportedError: as `foldconv.fold`, when training has ended.
    """

    priority = "LOWEST"  # after what saves checkpoints

    def __init__(self, batchnorm: bool = False, example_shape: Sequence[int] | None = None):
        expect_flags(batchnorm=batchnorm)
        self.batchnorm, self.example_shape = batchnorm, example_shape

    @master_only
    def after_train(self, runner: Any) -> None:
        """Fold the last checkpoint and the best ones."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for path in _kept(runner):
            out = fold_checkpoint(path, model, batchnorm=self.batchnorm, example_shape=self.example_shape)
            runner.logger.info(f"FoldHook: {path} folded: {out}")


def fold_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    out: str | os.PathLike[str] | None = None,
    *,
    batchnorm: bool = False,
    example_shape: Sequence[int] | None = None,
) -> Path:
    """Fold a checkpoint of a runner's, and write what ``mmengine.runner.load_checkpoint`` reads.

    Args:
        path: the checkpoint.
        model: the expanded network that it is of; left as it is.
        out: the file to write; by default `path` with `SUFFIX`.
        batchnorm, example_shape: as in `FoldHook`.

    Returns:
        The file that was written.

    Raises:
        CheckpointError: when the file cannot be read or does not fit.
        FoldMismatchError, UnsupportedError: as `foldconv.fold`.
    """
    out = Path(path).with_stem(Path(path).stem + SUFFIX) if out is None else Path(out)
    content, net = read_content(path), copy_of(model)
    load_exactly(net, take(content, path, network=net).tensors, path)
    example = None if example_shape is None else torch.zeros(*example_shape)
    folded = fold(net, batchnorm=batchnorm, example_inputs=example, inplace=True)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    save_checkpoint({"meta": meta or {}, "state_dict": folded.state_dict()}, str(out))
    return out


def _kept(runner: Any) -> list[str]:
    """The checkpoints that a runner's hooks kept as the last and the best, by paths."""
    found: list[Any] = []
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            best = getattr(hook, "best_ckpt_path_dict", {})
            found += [hook.last_ckpt, getattr(hook, "best_ckpt_path", None), *best.values()]
    return [*dict.fromkeys(str(path) for path in found if path is not None)]


def _register_layers(mixin: type = ComposedConv) -> None:
    for cls in mixin.__subclasses__():
        if issubclass(cls, PLAIN):
            MODELS.register_module(cls.__name__, module=cls)
        else:
            _register_layers(cls)


_register_layers()
