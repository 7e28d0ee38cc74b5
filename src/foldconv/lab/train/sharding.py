"""``strategy: fsdp``: gradients and the optimizer's state split among the processes, checkpoints whole."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer


class ShardedStrategy(ModelParallelStrategy):
    """Torch's ``fully_shard`` (FSDP2) over all processes, on GPUs and, with gloo, on CPUs.

    Lightning's own ``"fsdp"`` is FSDP1, which it runs on GPUs only. The network is one unit: its parameters are
    gathered for forward and backward, so that penalties on them can be computed beside the forward; between steps each
    process holds its share of the parameters, their gradients and the optimizer's state.

    A checkpoint is one file with whole tensors under the names they have in any other run: it can be resumed with
    another number of processes or another strategy, and opened without any.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def shard(self, network: nn.Module) -> None:
        """Split the network's parameters, join its batch norms where that was asked for; a second call does nothing."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(network, FSDPModule):
            if self._layer_sync is not None:  # Lightning leaves it out for this kind of strategy
                self._layer_sync.apply(network)
            fully_shard(network, mesh=init_device_mesh(self.root_device.type, (self.world_size,)))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors, under the numbers that ``Optimizer.state_dict`` gives to parameters.

        Torch's ``get_optimizer_state_dict`` would take a step to fill a state that is still empty, and leave weight
        decay in the momentum.
        """
        content = optimizer.state_dict()
        content["state"] = {
            number: {name: _whole(value) for name, value in state.items()} for number, state in content["state"].items()
        }
        return content

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Each process reads the file and keeps its share."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        content = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))
        module = self.lightning_module
        assert module is not None
        set_model_state_dict(module, content["state_dict"], options=StateDictOptions(full_state_dict=True))
        if module.trainer.state.fn == TrainerFn.FITTING:
            for optimizer, state in zip(self.optimizers, content["optimizer_states"], strict=True):
                optimizer.load_state_dict(_split(state, optimizer))
        return content


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is split; another tensor as it is.

    >>> import torch
    >>> own_share(torch.ones(2))
    tensor([1., 1.])
    """
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(value: Any) -> Any:
    """A tensor that is split is gathered, by all processes together; others are as they are."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if isinstance(value, Tensor) else value


def _split(content: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
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
