"""`Training`: the loop over batches and epochs, and all that a run needs to go on from where it was cut off."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import CheckpointError
from ...files.native import load_exactly
from ...layers.once import composed_once
from ...network.tree import evaluation
from ..data import ImageData, epoch_seed, evaluation_loader, training_loader, travelled
from ..tasks.module import TaskModule
from .classification import task_of
from .config import TrainConfig
from .divergence import Losses
from .optimizers import configured_groups, create_optimizer, create_schedule
from .processes import share_of_batch, summed
from .qat import QuantizationAware
from .sharding import ShardedStrategy, distributed, split, whole


class Training:
    """A network, what trains it, and how far it has come.

    What an epoch does depends on `state` at its start, and on nothing else: a run resumed from there repeats the epoch
    that was cut off, with the same images in the same order, and ends with the weights of an undisturbed run.

    Args:
        network: plain or expanded.
        config: of the run.
        data: the images.
        fabric: Lightning's, launched.
        checkpoint: the file that an error names once it is there.
        start: what `state` gave, to go on from, and the file that it comes from.

    Raises:
        CheckpointError: `start` is not a state of such a run.
        UnsupportedError: the processes cannot share the batches.
    """

    epoch: int = 0
    """Epochs that are done."""
    step: int = 0
    """Steps that the optimizer has done."""
    seconds: float = 0.0
    """The time spent in training epochs, without validation, over all parts of a run that was cut off."""

    def __init__(
        self,
        network: nn.Module,
        config: TrainConfig,
        data: ImageData,
        fabric: Any,
        checkpoint: Path,
        start: tuple[Path, dict[str, Any]] | None = None,
    ):
        self.config, self.fabric, self._checkpoint = config, fabric, checkpoint
        self.task, self._data = task_of(config.task), data
        strategy = fabric.strategy
        module = strategy.precision.convert_module(self.task.module(network.to(fabric.device), config, data))
        path, content = start or (checkpoint, None)
        if content is not None:
            with refused(path):
                load_exactly(module, content["state_dict"], path)
        self.module: TaskModule = module
        self._quantized = QuantizationAware(module.network, data.input_shape) if config.qat else None
        if self._quantized is not None:
            module.call_instead(self._quantized)
        self._dtype = next(self.module.parameters()).dtype
        self._called = distributed(self.module, strategy, config.sync_batchnorm)
        where = {"device": fabric.device, "workers": config.workers}
        where |= {"rank": fabric.global_rank, "world_size": fabric.world_size}
        share = share_of_batch(config.batch_size, fabric.world_size)
        self.batches = training_loader(data, share, config.seed, epoch=lambda: self.epoch, **where)
        self._test_batches = evaluation_loader(data, **where)
        self._optimizer = create_optimizer(configured_groups(self.module.network, config), config)
        self.steps_per_epoch = math.ceil(len(self.batches) / config.accumulate)
        self._schedule = create_schedule(self._optimizer, config, self.steps_per_epoch * config.epochs)
        if content is not None:
            with refused(path):
                self._load(content)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def train(self, progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """One epoch's steps; `progress` is called after each batch.

        Returns:
            ``train_loss`` and ``train_accuracy``.

        Raises:
            DivergedError: the loss or the weights are not finite.
        """
        begin = time.perf_counter()
        losses = Losses(self.fabric, self.epoch + 1, self._checkpoint)
        self.module.train()
        # What draws at random inside the network (dropout, stochastic depth) does so by seed and epoch alone, in each
        # process differently, as its images differ; so does an average in bfloat16, which timm rounds at random.
        seed = epoch_seed(self.config.seed, self.epoch)
        torch.manual_seed(seed + (self.fabric.global_rank << 32))
        if rounding := getattr(self.module.average, "_sr_generator", None):
            rounding.manual_seed(seed)
        for index, (images, targets) in enumerate(self.batches):
            found = self._batch(travelled(images, self._dtype), travelled(targets, self._dtype), index)
            losses.add(self.step, *found, len(targets))
            progress()
        means = losses.means(self.step, self.module.parameters())
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)  # steps are queued, not done, when they return
        self.epoch += 1
        self.seconds += time.perf_counter() - begin
        return means

    def _batch(self, images: Any, targets: Any, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward; a step of the optimizer by the mean over its batches."""
        config, strategy = self.config, self.fabric.strategy
        last = (index + 1) % config.accumulate == 0 or index + 1 == len(self.batches)
        if index % config.accumulate == 0:
            self._optimizer.zero_grad()
        with self._summing(last):
            with strategy.precision.forward_context():
                minimized, loss, right = self._called(images, targets)
            first = index - index % config.accumulate
            number = min(config.accumulate, len(self.batches) - first)  # an epoch's last step may have fewer
            part = minimized / number if number > 1 else minimized
            strategy.backward(part, self._called)
        if last:
            if config.clip_gradient:
                strategy.precision.unscale_gradients(self._optimizer)
                parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, config.clip_gradient)
            strategy.optimizer_step(self._optimizer)
            self._schedule.step()
            self.step += 1
            if self.module.average is not None:
                self.module.average.update(self.module.network)
        return minimized, loss, right

    def _summing(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients travel between processes with the last batch of a step."""
        called = self._called
        return contextlib.nullcontext() if last or not isinstance(called, DistributedDataParallel) else called.no_sync()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """How good the network is on the test images, shown and recorded; nothing is chosen by it.

        All processes evaluate with the first one's norm statistics, which checkpoints hold; each composes once.

        Returns:
            What the task's `score` finds, such as ``test_loss`` and ``test_accuracy``.
        """
        if self.fabric.world_size > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, 0)
        with evaluation(self.module.trained) as network, contextlib.ExitStack() as stack:
            # A split network has no whole parameters to compose from before its forward gathers them, and a compiled
            # one composes in its compiled code.
            if not isinstance(self.fabric.strategy, ShardedStrategy):
                stack.enter_context(composed_once(network))
            stack.enter_context(self.fabric.strategy.precision.forward_context())
            found = self.task.score(
                lambda images: self.module.outputs(travelled(images, self._dtype), network),
                self._test_batches,
                self._data,
                lambda *numbers: summed(self.fabric, *numbers),
            )
        return {f"test_{name}": value for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """All of it, as plain values and whole tensors; where the network is split, all processes have to ask."""
        quantizers = {} if self._quantized is None else {"quantizers": self._quantized.state()}
        return quantizers | {
            "epoch": self.epoch - 1,  # the last one that is done, as in files of Lightning's Trainer
            "global_step": self.step,
            "state_dict": whole(self.module.state_dict()),
            "optimizer_states": [whole(self._optimizer.state_dict())],
            "lr_schedulers": [self._schedule.state_dict()],
            "precision": self.fabric.strategy.precision.state_dict(),
            "seconds": self.seconds,
        }

    def _load(self, content: dict[str, Any]) -> None:
        """What is no tensor of the network; also from files of earlier versions, which Lightning's Trainer wrote."""
        done = [content[name] for name in ("global_step", "epoch")]
        if not all(type(number) is int for number in done):
            raise ValueError(f"expected whole numbers of steps and epochs, received {done}")
        self.step = done[0]
        self.epoch = done[1] + 1 if self.step else 0
        self._optimizer.load_state_dict(split(content["optimizer_states"][0], self._optimizer))
        self._schedule.load_state_dict(content["lr_schedulers"][0])
        needed = self.step + (self.config.epochs - self.epoch) * self.steps_per_epoch
        if needed > getattr(self._schedule, "total_steps", needed):
            raise ValueError(f"its schedule ends before step {needed}; continue with the epochs that it was made for")
        self.fabric.strategy.precision.load_state_dict(content.get("precision") or content.get("MixedPrecision") or {})
        if self._quantized is not None:
            self._quantized.load(content["quantizers"])
        self.seconds = content["seconds"] if "seconds" in content else content["callbacks"]["Stopwatch"]["seconds"]


@contextlib.contextmanager
def refused(path: Path) -> Iterator[None]:
    """A file that is no state of this run, or of a version that nobody knows, in one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be continued as config.yaml says: {reason}") from error
