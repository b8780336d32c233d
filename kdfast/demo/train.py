"""The training loop of every model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from kdfast.demo.data import Split
from kdfast.demo.models import logits_of
from kdfast.demo.settings import Schedule

__all__ = ["Fit", "Objective", "fit", "sweep"]

Objective = Callable[[Tensor, Tensor], Tensor]  # (logits, training rows) to a scalar loss


@dataclass
class Fit:
    """What a training run measured.

    Attributes:
        curve: test accuracy after every epoch.
        seconds: time of training, without evaluation.
        samples: samples trained on.
    """

    curve: list[float] = field(default_factory=list)
    seconds: float = 0.0
    samples: int = 0


def fit(
    model: nn.Module,
    train: Split,
    rows: Tensor,
    objective: Objective,
    schedule: Schedule,
    seed: int,
    *,
    test: Split,
    tick: Callable[[], None] = lambda: None,
) -> Fit:
    """Train ``model`` on the images ``rows`` of ``train``.

    The test accuracy is recorded, and nothing depends on it: the last step's model is the result.

    Args:
        model: the model, which is trained in place.
        train: the training split.
        rows: indices of the images to train on.
        objective: the loss.
        schedule: epochs, learning rate and batch size.
        seed: of the batches' order.
        test: the split to record the accuracy on.
        tick: called after every epoch.
    """
    optimizer = AdamW(model.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)
    decay = CosineAnnealingLR(optimizer, schedule.steps)
    batches = _batches(rows, schedule.batch, torch.Generator().manual_seed(seed))
    result = Fit()
    for _ in range(schedule.epochs):
        start = time.perf_counter()
        for _ in range(schedule.steps_per_epoch):
            result.samples += _step(model, train.images, next(batches), objective, optimizer)
            decay.step()
        _synchronize(train.images.device)
        result.seconds += time.perf_counter() - start
        result.curve.append(_accuracy(model, test))
        tick()
    return result


def sweep(model: nn.Module, images: Tensor, rows: Tensor, objective: Objective, schedule: Schedule) -> float:
    """Time one training pass over ``rows`` with a new optimiser. Returns seconds."""
    optimizer = AdamW(model.parameters(), schedule.learning_rate, fused=True)
    start = time.perf_counter()
    for batch in _split(rows, schedule.batch):
        _step(model, images, batch, objective, optimizer)
    _synchronize(images.device)
    return time.perf_counter() - start


def _step(
    model: nn.Module, images: Tensor, batch: Tensor, objective: Objective, optimizer: torch.optim.Optimizer
) -> int:
    loss = objective(model(images[batch]), batch)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return len(batch)


def _batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end: each pass is over all rows, in a new order."""
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        yield from _split(rows[order], size)


def _split(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _accuracy(model: nn.Module, test: Split) -> float:
    return float((logits_of(model, test.images).argmax(1) == test.labels).float().mean())


def _synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock times work and not its launch."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
