"""How several processes share the work: ``strategy: ddp`` or ``fsdp``, and checkpoints that are whole all the same."""

from __future__ import annotations

from typing import Any

from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from ..tasks.module import TaskModule


class ShardedStrategy(ModelParallelStrategy):
    """Torch's ``fully_shard`` (FSDP2) over all processes, on GPUs and, with gloo, on CPUs.

    Lightning's own ``"fsdp"`` is FSDP1, which it runs on GPUs only. The network is one unit: its parameters are
    gathered for forward and backward, so that penalties on them can be computed beside the forward; between steps each
    process holds its share of the parameters, their gradients and the optimizer's state.

    A checkpoint is one file with whole tensors under the names they have in any other run: it can be resumed with
    another number of processes or another strategy, and opened without any.
    """

    def __init__(self) -> None:
        super().__init__(parallelize_fn=self._shard)

    def _shard(self, module: nn.Module, _: Any) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        assert isinstance(module, TaskModule)
        fully_shard(module.network, mesh=init_device_mesh(self.root_device.type, (self.world_size,)))
        return module


def distributed(module: TaskModule, strategy: Any, sync_batchnorm: bool) -> nn.Module:
    """The module as it is called in training: with joined norms where that was asked for, and shared by `strategy`."""
    if sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return strategy.setup_module(module)


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is split; another tensor as it is.

    >>> import torch
    >>> own_share(torch.ones(2))
    tensor([1., 1.])
    """
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any) -> Any:
    """Each tensor that is split, at any depth, gathered by all processes together; others are as they are.

    Torch's ``get_optimizer_state_dict`` would take a step to fill a state that is still empty, and leave weight decay
    in the momentum.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


def split(content: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's whole state as `optimizer`'s parameters are split."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(number: int, value: Any) -> Any:
        parameter = parameters[number]
        if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    state = {
        number: {name: share(number, value) for name, value in entry.items()}
        for number, entry in content["state"].items()
    }
    return {**content, "state": state}
