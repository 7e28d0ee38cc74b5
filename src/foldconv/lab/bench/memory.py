"""How much memory a training step takes, and how much it keeps for its backward pass."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...ops import _buffers


def held_bytes(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and the optimizer's state, each storage once.

    >>> net = nn.Linear(3, 2)
    >>> held_bytes(net, torch.optim.SGD(net.parameters(), lr=0.1))
    32
    """
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [*network.parameters(), *network.buffers(), *(t for t in state if isinstance(t, torch.Tensor))]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def kept_bytes(forward: Callable[[], object], network: nn.Module) -> int:
    """Bytes that a forward keeps for the backward pass: each storage once, the network's parameters left out.

    Args:
        forward: runs the network and the loss, gradients recorded.
        network: whose parameters are there anyway.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> kept_bytes(lambda: net(torch.zeros(5, 2)), net)  # the input, and the ReLU's output
    100
    """
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    found: dict[int, torch.UntypedStorage] = {}  # storages are held, so that none is freed and counted again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in found.values())


def step_peak(step: Callable[[], object], network: nn.Module, device: str) -> int:
    """The most bytes allocated at any moment of a step, beyond those allocated before it; gradients count.

    On a GPU as torch's allocator counts. On a CPU by the profiler's list of allocations and releases, in which memory
    that foldconv keeps for reuse is seen too.

    Args:
        step: runs one training step.
        network: whose gradients are dropped first.
        device: ``"cpu"`` or ``"cuda"``.
    """
    network.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _every_allocation_by_torch(), _quiet():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return peak_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def peak_of(events: list[dict[str, Any]]) -> int:
    """The highest running sum of the bytes of the memory events of a trace, in the order of time.

    >>> bytes_of = [(1, 100), (3, -100), (2, 50), (4, 20)]
    >>> peak_of([{"name": "[memory]", "ts": ts, "args": {"Bytes": n, "Device Type": 0}} for ts, n in bytes_of])
    150
    """
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    total = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


@contextlib.contextmanager
def _every_allocation_by_torch() -> Iterator[None]:
    """Inside the block composed kernels lie in torch's own memory, where the profiler sees them."""
    before, _buffers.SMALLEST = _buffers.SMALLEST, math.inf  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        _buffers.SMALLEST = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing reaches standard error: the profiler's library reports there that it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
