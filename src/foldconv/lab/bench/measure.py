"""Run the measurements: every round runs every contestant once, in an order drawn anew for each round."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...layers.once import composed_once
from ...network.fold import fold
from .. import zoo
from ..machine import machine, versions
from .config import BenchConfig
from .contestants import PLAIN, Contestant, build
from .memory import held_bytes, kept_bytes, step_peak
from .samples import ratios, spread

FORMAT = "foldconv-bench-1"
WARM_UP = 2
"""Rounds that are not counted: libraries choose their algorithms, loops are compiled, momentum is allocated."""
FOLDS = 3
"""Folding is timed at most so many times: it takes seconds and is done once in a network's life."""

Progress = Callable[[str], None]
Calls = dict[str, Callable[[], object]]
Guests = Callable[[list[Contestant]], tuple[list[Contestant], Calls]]


def measure(
    config: BenchConfig,
    progress: Progress = lambda text: None,
    out: str | None = None,
    guests: Guests = lambda contestants: ([], {}),
) -> dict[str, Any]:
    """Measure what the config says.

    Args:
        config: what.
        progress: called with a line that says how far it is.
        out: the file that the result goes to, for the record of the command.
        guests: from the contestants of a case, further ones, and calls that are timed in the rounds of training steps.

    Returns:
        Plain values: machine, versions, arguments, the command, and ``results``, one per case and kind, with the raw
        samples of each contestant and their ratios (median and quartiles over the rounds of a contestant's value
        divided by the plain network's in the same round). Times are in seconds, memory in bytes.

    Raises:
        UnsupportedError: an unknown network or method, a path that cannot be taken, no GPU, a network that is no
            classifier of images.

    Example:
        >>> config = BenchConfig("digits_resnet", batch=(2,), size=(8,), methods=("doconv",), steps=1)
        >>> measure(config)["results"][0]["ratios"]["plain"]
        {'median': 1.0, 'lower': 1.0, 'upper': 1.0}
    """
    results: list[dict[str, Any]] = []
    contestants: list[Contestant] = []
    for number, (batch, size) in enumerate(config.cases):
        progress("building the networks")
        contestants = build(config)
        others, calls = guests(contestants)
        contestants += others
        for contestant in contestants if config.channels_last else ():
            # After the surgery: layers that replaced others are contiguous.
            contestant.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        case = _Case(config, contestants, calls, batch, size, progress)
        # Evaluation and folding first, on networks that no step has changed.
        with _one_thread() if config.clock == "cpu" else contextlib.nullcontext():
            for what in ("eval", "fold", "memory", "kept", "step", "loop"):
                if what in config.what and not (what == "fold" and number):
                    head = {"what": what, "network": config.network, "batch": batch, "size": size}
                    results.append(head | case.measured(what))
    progress("")
    return {
        "format": FORMAT,
        "command": config.command(out),
        "arguments": config.to_dict(),
        "machine": machine(config.device),
        "versions": versions(),
        "contestants": {c.name: c.describe() for c in contestants},
        "results": results,
    }


class _Case:
    """The contestants with images of one batch and size."""

    def __init__(
        self,
        config: BenchConfig,
        contestants: list[Contestant],
        calls: Calls,
        batch: int,
        size: int,
        progress: Progress,
    ):
        self.config, self.contestants, self.calls, self.progress = config, contestants, calls, progress
        self.name = f"{config.network} {batch}×{size}"
        plain = contestants[0].network
        channels = zoo.input_shape(plain)[0]
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch, channels, size, size, generator=generator).to(config.device)
        self.images = images.to(memory_format=torch.channels_last) if config.channels_last else images
        self.outputs = _outputs(config.network, plain, self.images)
        self.labels = torch.randint(self.outputs, (batch,), generator=generator).to(config.device)

    # ------------------------------------------------------------------ what is measured

    def measured(self, what: str) -> dict[str, Any]:
        """One of the words of `WHAT`."""
        of = {"eval": self.evaluation, "fold": self.folding, "memory": self.memory, "kept": self.kept}
        return (of | {"step": self.step, "loop": self.loop})[what]()

    def step(self) -> dict[str, Any]:
        """Seconds of a training step: gradients dropped, forward, cross-entropy, backward, SGD with momentum."""
        losses: dict[str, Tensor] = {}
        runs: Calls = {c.name: _Training(self, c, losses) for c in self.contestants}
        found = _timed(self._rounds(runs | self.calls))
        # JSON has no word for what is not finite.
        last = {name: float(loss) for name, loss in losses.items()}
        return found | {"last_loss": {name: loss if math.isfinite(loss) else None for name, loss in last.items()}}

    def evaluation(self) -> dict[str, Any]:
        """Seconds of an evaluation-mode forward, composed once and folded; whether folding leaves the plain modules."""
        networks: dict[str, tuple[Contestant, nn.Module]] = {}
        alike: dict[str, bool] = {}
        kinds = [type(module) for module in self.contestants[0].network.modules()]
        for c in self.contestants:
            networks[c.name] = c, c.network.eval()
            if c.method is not None:
                folded = fold(c.network)
                networks[f"{c.name} (folded)"] = c, folded
                alike[c.name] = [type(module) for module in folded.modules()] == kinds
        runs = {name: self._forward(c, network) for name, (c, network) in networks.items()}
        with contextlib.ExitStack() as opened:
            for c in self.contestants:
                with c.on_path():
                    opened.enter_context(composed_once(c.network))
            samples = self._rounds(runs)
        return _timed(samples) | {"folded_has_the_plain_modules": alike}

    def folding(self) -> dict[str, Any]:
        """Seconds that `foldconv.fold` takes, its check included."""
        samples: dict[str, list[float]] = {}
        for c in self.contestants:
            if c.method is not None:
                c.network.eval()
                self.progress(f"{self.name}: folding {c.name}")
                fold(c.network)  # the first of a process also loads what it needs
                samples[c.name] = [
                    self.seconds(functools.partial(fold, c.network)) for _ in range(min(FOLDS, self.config.steps))
                ]
        return {"seconds": samples, "medians": {name: spread(values)["median"] for name, values in samples.items()}}

    def memory(self) -> dict[str, Any]:
        """Bytes: what a contestant holds between steps, and the most that a step allocates on top of that."""
        found: dict[str, dict[str, int]] = {}
        for c in self.contestants:
            self.progress(f"{self.name}: memory of {c.name}")
            run = _Training(self, c, {})
            for _ in range(WARM_UP):
                run()
            peak = step_peak(run, c.network, self.config.device)
            found[c.name] = {"held": held_bytes(c.network, run.optimizer), "peak": peak}
        totals = {name: [float(values["held"] + values["peak"])] for name, values in found.items()}
        return {"bytes": found, "ratios": ratios(totals, PLAIN)}

    def kept(self) -> dict[str, Any]:
        """Bytes that the forward of a training step keeps for the backward pass, parameters left out."""
        found = {}
        for c in self.contestants:
            self.progress(f"{self.name}: bytes kept by {c.name}")
            run = _Training(self, c, {})
            run()  # libraries choose their algorithms
            found[c.name] = kept_bytes(run.loss, c.network)
        return {"bytes": found, "ratios": ratios({name: [float(n)] for name, n in found.items()}, PLAIN)}

    def loop(self) -> dict[str, Any]:
        """Seconds of an epoch of `foldconv train`, beside a bare loop over the same images; the plain network."""
        from .loop import BARE, epochs

        plain = self.contestants[0].network
        rounds = min(FOLDS, self.config.steps)
        found = epochs(self.config, plain, len(self.images), self.images.shape[1:], self.outputs, rounds, self.seconds)
        return _timed(found, BARE)

    # ------------------------------------------------------------------ how

    def _forward(self, contestant: Contestant, network: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode(), contestant.on_path(), self.autocast():
                network(self.images)

        return run

    def autocast(self) -> torch.autocast:
        """Autocast as the config says."""
        return torch.autocast(self.config.device, torch.bfloat16, enabled=self.config.amp)

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds until the device has done what was asked, by the config's clock."""
        clock = time.process_time if self.config.clock == "cpu" else time.perf_counter
        on_gpu = self.config.device == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        begin = clock()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - begin

    def _rounds(self, runs: Calls) -> dict[str, list[float]]:
        """One sample per contestant and round."""
        samples: dict[str, list[float]] = {name: [] for name in runs}
        order = random.Random(0)
        collecting = gc.isenabled()
        gc.disable()  # a collection would hit one contestant and count for it
        gc.freeze()  # what there is before the rounds need not be looked through after each
        try:
            for number in range(WARM_UP + self.config.steps):
                self.progress(f"{self.name}: round {number + 1} of {WARM_UP + self.config.steps}")
                # What ran before leaves the caches to what runs next: no contestant always follows the same one.
                for name in order.sample(list(runs), len(runs)):
                    seconds = self.seconds(runs[name])
                    if number >= WARM_UP:
                        samples[name].append(seconds)
                gc.collect()
        finally:
            gc.unfreeze()
            if collecting:
                gc.enable()
        return samples


class _Training:
    """A training step of one contestant, with its optimizer."""

    def __init__(self, case: _Case, contestant: Contestant, losses: dict[str, Tensor]):
        self.case, self.contestant, self.losses = case, contestant, losses
        self.network = contestant.network.train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9)

    def loss(self) -> Tensor:
        """Of the case's images."""
        with self.contestant.on_path(), self.case.autocast():
            return F.cross_entropy(self.network(self.case.images), self.case.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        loss = self.loss()
        with self.contestant.on_path():
            loss.backward()
        self.optimizer.step()
        self.losses[self.contestant.name] = loss.detach()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(samples: dict[str, list[float]], baseline: str = PLAIN) -> dict[str, Any]:
    medians = {name: spread(values)["median"] for name, values in samples.items()}
    return {"seconds": samples, "medians": medians, "ratios": ratios(samples, baseline)}


@torch.no_grad()
def _outputs(name: str, network: nn.Module, images: Tensor) -> int:
    """How many classes the network tells apart."""
    try:
        found = network.eval()(images)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UnsupportedError(f"{name}: does not take images of shape {tuple(images.shape)}: {what}") from error
    if not (isinstance(found, Tensor) and found.dim() == 2):
        raise UnsupportedError(
            f"{name}: expected a classifier whose output is one tensor (batch, classes), received "
            f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
        )
    return found.shape[1]
