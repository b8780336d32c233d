"""How an arm trains a model: ``Distiller`` on images in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.optim import AdamW

from kdfast.demo.models import logits_of
from kdfast.demo.settings import Schedule
from kdfast.distill import Distiller

__all__ = ["Batches", "Featured", "Remembered", "adamw", "fit"]

Model = TypeVar("Model", bound=nn.Module)


class Batches:
    """A loader: an epoch is ``schedule.steps_per_epoch`` batches, however many rows there are.

    Every pass over the rows is in a new order, which depends on ``seed`` alone.

    Args:
        columns: tensors of one length: (images,) without labels, or (images, labels).
    """

    def __init__(self, columns: tuple[Tensor, ...], schedule: Schedule, seed: int) -> None:
        self.columns, self.schedule = columns, schedule
        self._rows = self._endless(Generator().manual_seed(seed))

    def __len__(self) -> int:
        return self.schedule.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(len(self)):
            rows = next(self._rows)
            yield tuple(column[rows] for column in self.columns)

    def _endless(self, generator: Generator) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.columns[0]), generator=generator)
            yield from torch.split(order, self.schedule.batch)


class Featured(nn.Module):
    """``model``, a ``Sequential``, that also returns what its last layer is given: ``{"logits", "features"}``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        *body, last = self.model.children()
        features = images
        for layer in body:
            features = layer(features)
        return {"logits": last(features), "features": features}


class Remembered:
    """A teacher that has been asked once: a function of images that looks its answers up by what they show.

    Its answers are those of ``model`` in evaluation mode, a tensor or a mapping of tensors. Looking up takes a small
    part of the CNN's time. Raises ``KeyError`` for an image that it was not asked about.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._answers: Any = logits_of(model, images)
        self._rows = {bytes(image): row for row, image in enumerate(images.numpy())}

    def __call__(self, images: Tensor) -> Any:
        rows = [self._rows[bytes(image)] for image in images.numpy()]
        if isinstance(self._answers, dict):
            return {name: answers[rows] for name, answers in self._answers.items()}
        return self._answers[rows]


def adamw(schedule: Schedule) -> Callable[[Iterable[nn.Parameter]], AdamW]:
    """Makes the optimiser of every model, as ``Distiller`` takes it."""
    return partial(AdamW, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)


def fit(
    model: Model,
    columns: tuple[Tensor, ...],
    schedule: Schedule,
    seed: int,
    *,
    teacher: Any = None,
    **options: Any,
) -> Model:
    """Train ``model`` on ``columns`` by ``Distiller``, with its ``options``, and return it as the last step left it."""
    distiller = Distiller(model, teacher, optimizer=adamw(schedule), schedule="cosine", **options)
    distiller.fit(Batches(columns, schedule, seed), epochs=schedule.epochs, progress=False)
    return model
