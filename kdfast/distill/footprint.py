"""What a model costs: parameters, bytes, speed, memory. For a student beside its teacher."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdfast.distill.fields import samples
from kdfast.models import call, device_of, evaluating

__all__ = ["Footprint", "footprint", "peak_memory"]


@dataclass(frozen=True)
class Footprint:
    """Of one model."""

    parameters: int
    nbytes: int  # of parameters and buffers
    samples_per_second: float  # forward, in evaluation mode
    peak_memory: int  # bytes: of the GPU during the calls, or of the process since it began


def footprint(model: nn.Module, arguments: Any, *, repeats: int = 5) -> Footprint:
    """Call ``model`` on a batch and measure::

        for model in (teacher, student):
            print(footprint(model, images))

    Args:
        model: is in the mode it was in afterwards.
        arguments: what it is called with: a tensor, a tuple of positions or a dict of keywords; the first tensor's
            length is the number of samples.
        repeats: timed calls, after one that is not; the fastest counts.

    Raises:
        ValueError: ``repeats`` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    device = device_of(model) or torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with evaluating(model):
        seconds = [_seconds(model, arguments, device) for _ in range(repeats + 1)][1:]
    held = [*model.parameters(), *model.buffers()]
    return Footprint(
        parameters=sum(x.numel() for x in model.parameters()),
        nbytes=sum(x.numel() * x.element_size() for x in held),
        samples_per_second=samples(arguments) / min(seconds),
        peak_memory=peak_memory(device),
    )


def peak_memory(device: torch.device | None) -> int:
    """Bytes: the most that tensors have held of a GPU, or this process of the main memory."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _seconds(model: nn.Module, arguments: Any, device: torch.device) -> float:
    start = time.perf_counter()
    call(model, arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
