"""Data parallelism: who writes, and gradients that are the whole batch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdfast.labels.head import is_distributed

__all__ = [
    "all_of",
    "average_gradients",
    "bare",
    "is_first",
    "rank",
    "reduces_itself",
    "same",
    "share",
    "wait",
    "world_size",
]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes logs and checkpoints."""
    return rank() == 0


def bare(model: nn.Module) -> nn.Module:
    """Without DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def reduces_itself(model: nn.Module) -> bool:
    """Whether the backward pass averages gradients: under DDP and FSDP2 it does."""
    return isinstance(model, DistributedDataParallel) or any(map(is_distributed, model.parameters()))


def share(model: nn.Module, *, buffers_only: bool = False) -> None:
    """Give every process the first one's parameters and buffers."""
    if world_size() > 1 and not reduces_itself(model):
        for tensor in [*model.buffers(), *(() if buffers_only else model.parameters())]:
            dist.broadcast(tensor.detach(), 0)


def same(value: Any) -> Any:
    """The first process's, everywhere."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, 0)
    return holder[0]


def all_of(value: Any) -> list[Any]:
    """Every process's, in the order of ranks."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def wait() -> None:
    """For what another process writes."""
    if world_size() > 1:
        dist.barrier()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes. A gradient that some lack is zero there, and one that all lack is left out."""
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
