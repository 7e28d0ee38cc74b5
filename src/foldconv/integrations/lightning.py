"""Lightning: a callback that expands a module before it is trained, and folds the checkpoints that training kept."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from .._selection import Patterns
from ..errors import CheckpointError, FoldConvError, NoMatchError, UnsupportedError
from ..files.atomic import atomic_path
from ..files.folders import read_content
from ..files.native import describe_layers, expand_as_described, load_exactly
from ..layers import Foldable
from ..methods import Method, as_method
from ..methods._registry import Init, expect_init
from ..network._subclasses import is_convolution
from ..network.expand import expand
from ..network.fold import fold
from ..network.table import some
from ..network.tree import copy_of, first_names, foldable_layers

_LOG = logging.getLogger("foldconv")
_LAYERS = "foldconv_layers"
"""The checkpoint's entry that says which layers are expanded, and how."""
_OF_TRAINING = (_LAYERS, "callbacks", "loops", "lr_schedulers", "optimizer_states")
"""Entries that a folded checkpoint has no use for: nothing goes on training from it."""


class FoldConv(pl.Callback):
    """Train a ``LightningModule`` with foldable layers: ``Trainer(callbacks=[FoldConv("doconv")])``, nothing else.

    The module is expanded in place when ``fit``, ``validate``, ``test`` or ``predict`` starts: before
    ``configure_optimizers``, and before a checkpoint is loaded (``ckpt_path=``), which therefore goes on exactly. A
    module that the callback has expanded already is left as it is. When ``fit`` ends, each checkpoint that was kept
    gets its fold beside it, ``NAME.folded.ckpt``, which the module's own ``load_from_checkpoint`` reads without
    foldconv; the module itself stays expanded (`foldconv.fold` folds it).

    Give the optimizer `foldconv.parameter_groups` (``foldconv.parameter_groups(self, weight_decay)`` in
    ``configure_optimizers``), so that weight decay meets kernels and leaves gates, scales and norms alone.

    Args:
        method: a name or a config as of `foldconv.expand`; None where the module is expanded by other means, for the
            folds alone.
        network: the attribute that holds the network (``"net"``, ``"model.backbone"``), where the module should not be
            expanded as a whole. By default the module itself; the only child with convolutions, where it has no
            ``forward``.
        include, exclude: as of `foldconv.expand`, on names inside the network.
        init: as of `foldconv.expand`; drawn anew (``"paper"``) only when ``fit`` starts.
        example_inputs: as of `foldconv.expand`, what the network is called with.
        fold: whether checkpoints are folded when ``fit`` ends.

    Raises:
        NoMatchError, UnsupportedError: from ``fit``, as of `foldconv.expand`.

    Example:
        >>> import foldconv.lightning
        >>> expanding = foldconv.lightning.FoldConv("repvgg", network="net", exclude="stem.*")
        >>> trainer = pl.Trainer(max_epochs=5, callbacks=[expanding], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        method: str | Method | None = "doconv",
        *,
        network: str | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        init: Init = "preserve",
        example_inputs: Any = None,
        fold: bool = True,
    ):
        expect_init(init)
        self.method = None if method is None else as_method(method)
        self.network, self.include, self.exclude = network, include, exclude
        self.init: Init = init
        self.example_inputs = example_inputs
        self.fold = fold

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Expand, unless that is done."""
        if self.method is not None:
            self._come_first(trainer.callbacks, pl_module)
            # Where weights are only evaluated they stay what they compute.
            self._expand(pl_module, self.method, self.init if stage == "fit" else "preserve")
        self._there = _convolutions(pl_module)

    def _come_first(self, callbacks: list[Any], module: Any) -> None:
        """Refuse the place behind a callback that has copied the plain module, as those that average weights do."""
        for callback in callbacks[: callbacks.index(self)]:
            held = [value for value in vars(callback).values() if isinstance(value, nn.Module) and value is not module]
            if any(type(module) is type(inner) for value in held for inner in value.modules()):
                raise UnsupportedError(
                    f"callbacks: {type(callback).__name__} stands before FoldConv and has copied the module as it was; "
                    "expected FoldConv first"
                )

    def _expand(self, module: Any, method: Method, init: Init) -> None:
        name = self._network_of(module) if self.network is None else self.network
        try:
            network = module.get_submodule(name)
        except AttributeError:
            children = ", ".join(child for child, _ in module.named_children()) or "none"
            raise UnsupportedError(
                f"network: {type(module).__name__} has no {name!r}; expected the name of a module in it ({children})"
            ) from None
        done = vars(module).setdefault("_expanded_for_training", [])
        if name in done and _expanded_in(network):
            return
        before = _count(module)
        chosen: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "init": init}
        try:
            expanded = expand(network, method, **chosen, example_inputs=self.example_inputs, inplace=True)
        except NoMatchError as error:
            raise NoMatchError(
                f"{error}; what setup() or configure_model() build is not there yet: build it in __init__, or call "
                "foldconv.expand on it there; for a module that is expanded by other means: FoldConv(None)"
            ) from None
        if expanded is not network:  # it was itself a convolution
            module.set_submodule(name, expanded)
        done.append(name)
        count = len(_expanded_in(expanded))
        rank_zero_info(
            f"foldconv: {method.name} in {count} of {count + len(_convolutions(expanded))} convolutions of "
            f"{name or type(module).__name__}; parameters: {before:,}, in training {_count(module):,}"
        )

    @staticmethod
    def _network_of(module: Any) -> str:
        """The name of what is expanded: the module itself, where it has a forward that says what follows what."""
        if is_overridden("forward", module, pl.LightningModule):
            return ""
        names = [name for name, child in module.named_children() if _convolutions(child) or _expanded_in(child)]
        if len(names) > 1:
            raise UnsupportedError(
                f"{type(module).__name__} has no forward, and convolutions in {', '.join(names)}; say which to expand "
                f"with network={names[0]!r}, each by a callback of its own"
            )
        return names[0] if names else ""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell of convolutions that came too late to be expanded."""
        late = [name for name in _convolutions(pl_module) if name not in self._there]
        if late and self.method is not None:
            _LOG.warning(
                "FoldConv: %d convolutions stay as they are (%s): setup() or configure_model() built them after the "
                "callback had expanded the module; build them in __init__",
                *(len(late), some(late)),
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell of parameters that no optimizer has, of layers that are trained."""
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        for name, layer in foldable_layers(pl_module).items():
            own = {key: id(p) in held for key, p in layer.named_parameters() if p.requires_grad}
            if any(own.values()) and not all(own.values()):
                _LOG.warning(
                    "FoldConv: no optimizer has %s.%s: parameters that configure_optimizers takes must be collected "
                    "when it is called (self.parameters(), foldconv.parameter_groups(self, weight_decay))",
                    *(name, next(key for key, there in own.items() if not there)),
                )
                return

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Record which layers are expanded, and how, for `fold_checkpoint`."""
        checkpoint[_LAYERS] = describe_layers(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Fold each checkpoint that was kept."""
        if not self.fold or not trainer.is_global_zero:
            return
        written = []
        for path in _kept(trainer):
            try:
                written.append(fold_checkpoint(path, pl_module))
            except (FoldConvError, OSError) as error:  # the checkpoint itself is there, and training was not in vain
                _LOG.warning("FoldConv: %s is not folded: %s", path, error)
        if written:
            rank_zero_info(f"foldconv: folded {', '.join(map(str, written))}")


def fold_checkpoint(path: str | os.PathLike[str], module: Any, out: str | os.PathLike[str] | None = None) -> Path:
    """Fold a checkpoint of an expanded ``LightningModule`` into one of the plain module.

    Its weights and hyperparameters, and what the module itself put into it, are kept; states of optimizers, loops and
    callbacks are not. No code in the file is run.

    Args:
        path: a checkpoint that the trainer wrote.
        module: the module, plain or expanded; left as it is.
        out: the file to write; by default ``NAME.folded.ckpt`` beside ``NAME.ckpt``. An existing one is replaced.

    Returns:
        The file written.

    Raises:
        CheckpointError: not such a checkpoint, or of another module.
        FoldMismatchError, UnsupportedError: as of `foldconv.fold`.
    """
    path = Path(path)
    content = read_content(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path}: expected a checkpoint of Lightning's Trainer, found no state_dict in it")
    if _LAYERS in content and not _expanded_in(module):
        work: Any = expand_as_described(module, content[_LAYERS], path)
    else:
        work = copy_of(module)
    work.cpu()
    work.trainer = module._trainer
    work.on_load_checkpoint(content)
    if work.strict_loading:
        load_exactly(work, content["state_dict"], path)
    else:
        work.load_state_dict(content["state_dict"], strict=False)
    folded: Any = fold(work, blocks=False, inplace=True)
    kept = {key: value for key, value in content.items() if key not in _OF_TRAINING}
    kept["state_dict"] = folded.state_dict()
    with contextlib.suppress(RuntimeError) if module._trainer is None else contextlib.nullcontext():
        folded.on_save_checkpoint(kept)  # which may ask for the trainer
    target = path.with_suffix(f".folded{path.suffix}") if out is None else Path(out)
    with atomic_path(target) as temporary:
        torch.save(kept, temporary)
    return target


def _kept(trainer: Any) -> list[str]:
    """The files that ``ModelCheckpoint`` callbacks have left, each once."""
    paths: list[Any] = []
    for callback in trainer.checkpoint_callbacks:
        paths += getattr(callback, "best_k_models", {})
        paths += [getattr(callback, name, None) for name in ("best_model_path", "last_model_path")]
    found = {os.path.realpath(path): path for path in paths if path and os.path.exists(path)}
    return list(found.values())


def _expanded_in(module: nn.Module) -> list[Foldable]:
    """The layers that a method put there; a user's own blocks are part of the network."""
    return [layer for layer in foldable_layers(module).values() if layer.method is not None]


def _convolutions(module: nn.Module) -> dict[str, nn.Module]:
    """The convolutions that are as they were."""
    return {name: m for m, name in first_names(module).items() if is_convolution(m) and not isinstance(m, Foldable)}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
