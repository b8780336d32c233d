"""Measuring a student: its metrics on a loader, and what it costs in parameters, bytes, speed and memory."""

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
from kdfast.distill.arguments import check_loader
from kdfast.distill.counting import Counting
from kdfast.distill.fields import samples
from kdfast.distill.metrics import Metrics, is_function
from kdfast.distill.step import Step, SupportsForward
from kdfast.labels import SoftLabels, Weights
from kdfast.models import call, device_of, evaluating, logits_of
from kdfast.objectives.teacher_argmax import teacher_argmax

__all__ = ["Footprint", "evaluate", "footprint", "peak_memory"]


def evaluate(distiller: SupportsForward, loader: Iterable[Any], metrics: Any = None) -> dict[str, float]:
    """Evaluate a ``Distiller``'s student: every metric over all rows of ``loader`` that count. Returns them by name.

    The student runs in evaluation mode and without gradients. The mode of each of its submodules is restored
    afterwards, after an error, too.

    Args:
        distiller: a ``Distiller``. The agreement is with its teacher, on the records that the teacher knows.
        loader: batches as ``Distiller.fit`` takes them.
        metrics: names, torchmetrics' metrics by name, or None, as ``kdfast.distill.metrics.Metrics`` takes them; or a
            function (distiller, loader) that returns numbers by name.

    Raises:
        ValueError: the loader is empty.
        TypeError: ``distiller`` is a model, or there are no batches in ``loader``.
    """
    if not hasattr(distiller, "objective") or not hasattr(distiller, "student"):
        raise TypeError(
            f"evaluate takes a Distiller, got a {type(distiller).__name__}: evaluate(Distiller(student), loader)"
        )
    if not is_function(metrics):
        check_loader("evaluate", loader)
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
    """The likeliest class of each row by a single teacher, -1 for rows that it has no labels of.

    None without a teacher, with several, or of a sampler's draws, which have no likeliest class.
    """
    if teacher is None or isinstance(teacher, tuple):
        return None
    output = teacher.unpack() if isinstance(teacher, PackedLabels) else teacher
    if isinstance(output, Weights):
        return None
    return teacher_argmax(output if isinstance(output, SoftLabels) else logits_of(output), ignore_index=-1)


@dataclass(frozen=True)
class Footprint:
    """What a model costs.

    Attributes:
        parameters: the number of its parameters.
        nbytes: bytes of its parameters and buffers.
        samples_per_second: speed of the forward pass in evaluation mode.
        peak_memory: bytes: the most that tensors held of the GPU during the calls; on the CPU, the most that the
            process has held since it started.
    """

    parameters: int
    nbytes: int
    samples_per_second: float
    peak_memory: int


def footprint(model: nn.Module, arguments: Any, *, repeats: int = 5) -> Footprint:
    """Measure what ``model`` costs, by calling it on a batch::

        for model in (teacher, student):
            print(footprint(model, images))

    Args:
        model: the model. Its mode is restored afterwards.
        arguments: its arguments: a tensor, a tuple of positional arguments or a dict of keywords. The length of the
            first tensor is the number of samples.
        repeats: the number of timed calls, after one call that is not timed. The fastest counts.

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
    """Peak memory in bytes: the most that tensors have held of a GPU, or that this process has held on the CPU."""
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
