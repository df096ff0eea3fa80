"""Weights that are sharded over processes (FSDP2), a step of a stack at a time, so that every backprop mode works.

Lightning's ``ModelParallelStrategy`` leaves the sharding to the module. The unit that is gathered for a forward pass,
and again for the backward pass, is one step: the unit that a stack runs, recomputes, or undoes. The rest of the net
(stem, transitions, head) is gathered as a whole.
"""

from collections import Counter
from typing import Any

import lightning as L
from torch import nn

from schemes import SchemeError

from ..gather import outermost


def shard(net: nn.Module, mesh: Any) -> None:
    """Shards the parameters of a net over the processes of a mesh.

    Args:
        net: the network; it must have the same values on each process.
        mesh: of one dimension.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(net, FSDPModule):  # a second stage of the same run
        return
    steps = [step for stack in outermost(net) for step in stack.steps]
    used = Counter(id(p) for step in steps for p in set(step.parameters()))
    for step in steps:
        own = list(step.parameters())
        # Parameters that several steps share belong to none of them.
        if own and all(used[id(p)] == 1 for p in own):
            fully_shard(step, mesh=mesh)
    fully_shard(net, mesh=mesh)


def shard_module(module: L.LightningModule, net: nn.Module) -> None:
    """Shards the net of a module that ``ModelParallelStrategy`` trains.

    Args:
        module: the module that Lightning trains.
        net: its network, which holds all of its parameters.

    Raises:
        SchemeError: tensor parallelism, checkpoints in parts, or parameters outside the net.
    """
    strategy: Any = module.trainer.strategy
    if strategy.device_mesh["tensor_parallel"].size() != 1:
        raise SchemeError(
            "ModelParallelStrategy: a net is divided over processes that see different samples, and no layer is cut\n"
            "  Give data_parallel_size the number of processes, and tensor_parallel_size 1"
        )
    if strategy._save_distributed_checkpoint:
        raise SchemeError(
            "ModelParallelStrategy: checkpoints in parts, one of each process, cannot be replaced as a whole\n"
            "  Give it save_distributed_checkpoint: false"
        )
    inside = {id(p) for p in net.parameters()}
    outside = [name for name, p in module.named_parameters() if id(p) not in inside]
    if outside:
        raise SchemeError(
            f"ModelParallelStrategy: {outside[0]} is no part of the net, and its gradients would stay on each process\n"
            "  Train it with the strategy ddp"
        )
    shard(net, strategy.device_mesh["data_parallel"])


def divided(module: nn.Module) -> bool:
    """Whether the parameters of a module are sharded over processes.

    Args:
        module: the network, or a module that holds it.
    """
    from torch.distributed.fsdp import FSDPModule

    # Tested on the modules: between a forward and a backward pass the parameters themselves may be whole.
    return any(isinstance(part, FSDPModule) for part in module.modules())


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Returns the state dict on every process, gathered if the module is sharded; then all processes must call this.

    Args:
        module: the network, or a module that holds it.
    """
    if not divided(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
