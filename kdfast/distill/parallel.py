"""Data parallelism: which process writes, what is broadcast or gathered, and gradients averaged over processes.

Without a process group every function acts as for a single process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdfast.labels.output_module import is_distributed

__all__ = [
    "all_gather_object",
    "average_gradients",
    "barrier",
    "broadcast_module",
    "broadcast_object",
    "is_first",
    "maximum",
    "rank",
    "reduces_itself",
    "unwrap",
    "world_size",
]


def world_size() -> int:
    """The number of processes in the default group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank in the default group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process has rank 0, and so writes logs and checkpoints."""
    return rank() == 0


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel`` and ``torch.compile``; any other module is returned as it is."""
    while (inner := model.module if isinstance(model, DistributedDataParallel) else _compiled(model)) is not None:
        model = inner
    return model


def _compiled(model: nn.Module) -> nn.Module | None:
    return model._modules.get("_orig_mod")


def reduces_itself(model: nn.Module) -> bool:
    """Whether the model's backward pass averages gradients by itself, as under DDP and FSDP2."""
    return isinstance(model, DistributedDataParallel) or any(map(is_distributed, model.parameters()))


def broadcast_module(model: nn.Module, *, buffers_only: bool = False) -> None:
    """Broadcast rank 0's parameters and buffers, or its buffers only. A model under DDP or FSDP2 is left alone."""
    if world_size() > 1 and not reduces_itself(model):
        for tensor in [*model.buffers(), *(() if buffers_only else model.parameters())]:
            dist.broadcast(tensor.detach(), 0)


def broadcast_object(value: Any) -> Any:
    """Broadcast rank 0's object, which must be picklable. Returns it on every rank."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, 0)
    return holder[0]


def all_gather_object(value: Any) -> list[Any]:
    """Gather a picklable object of every process. Returns them in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def maximum(*values: int) -> Any:
    """The largest of all processes' values, value by value: a number for one, a list for several."""
    found = list(values)
    if world_size() > 1:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        tensor = torch.tensor(found, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        found = tensor.tolist()
    return found if len(found) > 1 else found[0]


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over ranks, in place.

    A rank without a gradient of a parameter counts as zero. A parameter without a gradient on any rank is skipped.
    """
    if not parameters:
        return
    has = torch.tensor([float(x.grad is not None) for x in parameters], device=parameters[0].device)
    dist.all_reduce(has)
    used = [x for x, count in zip(parameters, has.tolist(), strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()
