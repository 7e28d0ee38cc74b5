"""`TaskModule`: a network with its loss, and an average of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TaskModule(nn.Module):
    """What is trained: a network, its loss, and an average of its weights.

    With ``config.ema`` the network is evaluated, and later folded, with the average of its weights over the steps
    (timm's ModelEmaV3, norm statistics included), and checkpoints hold both.

    Args:
        network: plain or expanded.
        config: a `TrainConfig`: averaging, compilation, memory layout.
    """

    def __init__(self, network: nn.Module, config: Any):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last) if config.channels_last else network  # pyright: ignore[reportCallIssue]
        self._config = config
        self.average: Any = None
        if config.ema:
            from timm.utils.model_ema import ModelEmaV3

            self.average = ModelEmaV3(network, decay=config.ema).requires_grad_(False)
        called = torch.compile(network) if config.compile else network
        self.call_instead(called)

    @property
    def trained(self) -> nn.Module:
        """The network that counts: the averaged one where there is an average."""
        return self.network if self.average is None else self.average.module

    def call_instead(self, called: Any) -> None:
        """What is called in the network's place; no submodule, since each tensor has one name in a checkpoint."""
        object.__setattr__(self, "_called", called)

    def forward(self, images: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimized, the loss in it that is shown, and how many images were right (a part of one counts)."""
        raise NotImplementedError

    def outputs(self, images: Any, network: nn.Module | None = None, *more: Any) -> Any:
        """What the network that is trained, or another one, computes; `more` are further arguments."""
        if self._config.channels_last and isinstance(images, Tensor):
            images = images.contiguous(memory_format=torch.channels_last)
        called: Any = self._called if network is None or network is self.network else network
        return called(images, *more)
