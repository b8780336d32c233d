"""A student measured: its metrics on a loader, and what it costs in parameters, bytes, speed and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.cache import PackedLabels
from kdfast.distill.counting import Counting
from kdfast.distill.fields import samples
from kdfast.distill.metrics import Metrics, is_function
from kdfast.distill.step import Step, SupportsForward
from kdfast.labels import SoftLabels
from kdfast.models import call, device_of, evaluating, logits_of
from kdfast.objectives.teacher_argmax import teacher_argmax

__all__ = ["Footprint", "evaluate", "footprint", "peak_memory"]


def evaluate(distiller: SupportsForward, loader: Iterable[Any], metrics: Any = None) -> dict[str, float]:
    """Every metric over all rows of a loader that count, in evaluation mode and without gradients.

    Each part of the student has its own mode back afterwards, whatever has happened.

    Args:
        distiller: whose student, and whose teacher for the agreement, where it knows the loader's records.
        loader: of batches as ``fit`` takes them.
        metrics: as ``Metrics`` takes them, or a function (distiller, loader) of one's own giving numbers by name.

    Raises:
        ValueError: the loader is empty.
    """
    with evaluating(distiller.student), torch.no_grad():
        if is_function(metrics):
            return {name: float(value) for name, value in metrics(distiller, loader).items()}
        found = Metrics(metrics)
        counting = Counting.of(distiller.objective)
        empty = True
        for batch in loader:
            _count(found, distiller.forward(batch, strict=False), counting)
            empty = False
    if empty:
        raise ValueError("the evaluation's loader is empty")
    return found.compute()


def _count(metrics: Metrics, step: Step, counting: Counting) -> None:
    logits = step.logits
    rows, classes = logits.shape[:-1], logits.shape[-1]
    labels = step.labels
    if labels is not None:
        labels = counting.labels(labels.argmax(-1) if labels.is_floating_point() else labels)
        if labels.shape != rows:
            raise ValueError(f"labels must be {tuple(rows)} for this student, got {tuple(labels.shape)}")
    counted = counting.of_step(step)
    labels = None if labels is None else labels[counted]
    teacher = _argmax(step.teacher) if metrics.need_teacher else None
    if teacher is not None:
        teacher = teacher.view(rows)
        both = counted & (teacher >= 0)
        metrics.update(logits[both].view(-1, classes), None, teacher[both])
    metrics.update(logits[counted], labels, None)


def _argmax(teacher: Any) -> Tensor | None:
    """The classes that a single teacher has said, -1 where it says nothing; None where it has none to say."""
    if teacher is None or isinstance(teacher, tuple):
        return None
    output = teacher.unpack() if isinstance(teacher, PackedLabels) else teacher
    if isinstance(output, SoftLabels) and output.kind == "weights":
        return None
    return teacher_argmax(output if isinstance(output, SoftLabels) else logits_of(output), ignore_index=-1)


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
