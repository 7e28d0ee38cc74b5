"""Which parameters learn how fast: groups, optimizer and schedule of a `TrainConfig`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedError, option_names, refused_option, unknown
from ...layers import Foldable
from ...network.parameters import parameter_groups
from .config import TrainConfig

Groups = list[dict[str, Any]]
_CONVOLUTIONS = (nn.modules.conv._ConvNd, Foldable)
_SCHEDULE_ARGS = {
    **{"cosine": {"final": 0.0}, "poly": {"power": 0.9, "final": 0.0}},
    **{"step": {"milestones": None, "factor": 0.1}, "constant": {}},
}
_ONECYCLE_SET = {"total_steps", "epochs", "steps_per_epoch", "last_epoch"}  # by the run itself


def configured_groups(network: nn.Module, config: TrainConfig) -> Groups:
    """`training_groups` with what a config says."""
    return training_groups(
        network,
        config.weight_decay,
        config.lr,
        config.stem_lr_factor,
        config.bias_lr_factor,
        norm_bias_factor=config.norm_bias_lr_factor,
        decay=config.decay,
    )


def training_groups(
    network: nn.Module,
    weight_decay: float,
    lr: float,
    stem_factor: float = 1.0,
    bias_factor: float = 1.0,
    *,
    norm_bias_factor: float = 1.0,
    decay: str = "kernels",
) -> Groups:
    """The groups of `foldconv.parameter_groups`, split further where the learning rate differs.

    Args:
        network: plain or expanded.
        weight_decay: the decay of the parameters that have one.
        lr: the learning rate of all others.
        stem_factor: of the first convolution, relative to `lr`; OREPA's authors advise to tune it when transferring.
        bias_factor: of the biases of convolutions and linear layers (Caffe's networks learn them twice as fast).
        norm_bias_factor: of all other biases, norms' (code that goes by the name 'bias' means them, too).
        decay: what decays: ``kernels`` as in `parameter_groups`, ``scales``: OREPA's of its branches too, or ``all``.

    >>> import foldconv
    >>> net = foldconv.expand(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2)), "doconv")
    >>> [(len(g["params"]), g["lr"]) for g in training_groups(net, 1e-4, 0.1, stem_factor=0.5)]
    [(1, 0.1), (1, 0.1), (2, 0.05), (1, 0.05)]
    """
    groups = [{**group, "lr": lr} for group in parameter_groups(network, weight_decay)]
    if decay != "kernels":
        groups = _with_more_decay(groups, network, weight_decay, decay == "all")
    if stem_factor == bias_factor == norm_bias_factor == 1:
        return groups
    first = next((module for module in network.modules() if isinstance(module, _CONVOLUTIONS)), None)
    stem = {id(parameter) for parameter in first.parameters()} if first is not None else set()
    owners = (*_CONVOLUTIONS, nn.Linear)
    biases = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, owners)
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias"
    }

    others = {id(p) for name, p in network.named_parameters() if name.rpartition(".")[2] == "bias"} - biases

    def factor(parameter: nn.Parameter) -> float:
        own = stem_factor if id(parameter) in stem else 1.0
        own *= bias_factor if id(parameter) in biases else 1.0
        return own * (norm_bias_factor if id(parameter) in others else 1.0)

    split: Groups = []
    # the plain learning rate comes first: the first group's is the one that logs show
    for value in sorted(
        {factor(p) for group in groups for p in group["params"]}, key=lambda value: (value != 1, value)
    ):
        for group in groups:
            params = [parameter for parameter in group["params"] if factor(parameter) == value]
            if params:
                split.append({**group, "params": params, "lr": lr * value})
    return split


def _with_more_decay(groups: Groups, network: nn.Module, weight_decay: float, everything: bool) -> Groups:
    """The groups with OREPA's scales, or all parameters, where the kernels are."""
    scales = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, Foldable)
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith("vector")
    }
    decayed: Groups = [{**groups[0], "params": [], "weight_decay": weight_decay}]
    kept: Groups = []
    for group in groups:
        moved = group["weight_decay"] == weight_decay or everything
        rest = [parameter for parameter in group["params"] if not moved and id(parameter) not in scales]
        decayed[0]["params"] += [parameter for parameter in group["params"] if moved or id(parameter) in scales]
        kept.append({**group, "params": rest})
    return [group for group in decayed + kept if group["params"]]


def create_optimizer(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or any optimizer that timm knows by name.

    Raises:
        UnsupportedError: no such optimizer (the nearest is given), or an option that it does not take.
    """
    if config.optimizer == "sgd":
        options = {"nesterov": config.momentum > 0, **config.optimizer_args}
        make: Callable[[], torch.optim.Optimizer] = lambda: torch.optim.SGD(  # noqa: E731
            groups, lr=config.lr, momentum=config.momentum, **options
        )
        kind: Callable[..., Any] = torch.optim.SGD
    else:
        from timm.optim import create_optimizer_v2, list_optimizers  # pyright: ignore[reportPrivateImportUsage]
        from timm.optim import get_optimizer_class as class_of  # pyright: ignore[reportPrivateImportUsage]

        known = [str(name) for name in list_optimizers()]
        if config.optimizer not in known:
            raise UnsupportedError(unknown("optimizer of timm", config.optimizer, known))
        make = lambda: create_optimizer_v2(  # noqa: E731
            groups,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=0.0,
            momentum=config.momentum,
            **config.optimizer_args,
        )
        kind = class_of(config.optimizer, bind_defaults=False)
    try:
        return make()
    except (TypeError, ValueError) as error:
        given, option = ", ".join(config.optimizer_args) or "none", refused_option(error)
        reason = str(error) if option is None else unknown("option", option, _own_options(kind))
        raise UnsupportedError(f"optimizer_args of {config.optimizer!r} (given: {given}): {reason}") from None


def _own_options(kind: Callable[..., Any]) -> list[str]:
    """What `optimizer_args` may hold: not what is a field of the config itself."""
    return [name for name in option_names(kind) if name not in ("lr", "momentum", "weight_decay")]


def create_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """A scheduler of torch for each step; a run resumed in the middle goes on in it.

    onecycle is torch's (with its cycled momentum off). The others are a warm-up from 0 in ``warmup_epochs``, then half
    a cosine down to ``final`` (share of lr), or a straight line down to it, to the power ``power`` (poly), or steps by
    ``factor`` at ``milestones`` (epochs), or nothing.

    Args:
        optimizer: its groups' learning rates are the highest ones.
        config: the schedule and its options.
        steps: optimizer steps of the whole run.

    Raises:
        UnsupportedError: an option that the schedule does not take.
    """
    if config.schedule == "onecycle":
        highest = [group["lr"] for group in optimizer.param_groups]
        options = {"cycle_momentum": False, **config.schedule_args}  # a cycled momentum would need one to cycle
        cycle = torch.optim.lr_scheduler.OneCycleLR
        known = [name for name in option_names(cycle) if name not in _ONECYCLE_SET]
        for key in config.schedule_args:
            if key not in known:
                raise UnsupportedError(f"schedule_args of 'onecycle': {unknown('option', key, known)}")
        try:
            return cycle(optimizer, highest, steps, **options)
        except (TypeError, ValueError) as error:
            raise UnsupportedError(f"schedule_args of 'onecycle': {error}") from None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, _factor(config, steps))


def _factor(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """The learning rate's share of the highest one, at each step."""
    known = _SCHEDULE_ARGS[config.schedule]
    for key in config.schedule_args:
        if key not in known:
            raise UnsupportedError(f"schedule_args of {config.schedule!r}: {unknown('option', key, known)}")
    options = {**known, **config.schedule_args}
    epoch = steps / config.epochs  # in steps
    warm = round(config.warmup_epochs * epoch)
    milestones: list[float] = []
    if config.schedule == "step":
        milestones = _milestones(options["milestones"], config.epochs)
    for key in ("final", "factor", "power"):
        if key in options and (isinstance(options[key], bool) or not isinstance(options[key], int | float)):
            raise UnsupportedError(f"schedule_args: {key}: expected a number, received {options[key]!r}")

    def share(step: int) -> float:
        if step < warm:
            return step / warm
        if config.schedule in ("cosine", "poly"):
            done = min((step - warm) / max(steps - warm, 1), 1.0)
            left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else (1 - done) ** options["power"]
            return options["final"] + (1 - options["final"]) * left
        passed = sum(step >= round(milestone * epoch) for milestone in milestones)
        return options.get("factor", 1.0) ** passed

    return share


def _milestones(given: Any, epochs: int) -> list[float]:
    """After which epochs the rate drops; by default at a half and three quarters of the run, as for CIFAR."""
    if given is None:
        return [epochs / 2, epochs * 3 / 4]
    numbers = given if isinstance(given, list | tuple) else [given]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise UnsupportedError(f"schedule_args: milestones: expected a list of epochs, received {given!r}")
    return [float(number) for number in numbers]


def check_optimizer(config: TrainConfig) -> None:
    """Refuse a config whose optimizer or schedule cannot be made, before anything is loaded or written."""
    optimizer = create_optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))], "lr": config.lr}], config)
    create_schedule(optimizer, config, steps=config.epochs)
