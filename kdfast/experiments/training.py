"""How an arm trains a model: with ``Distiller``, on inputs in memory."""

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

__all__ = ["Batches", "PrecomputedTeacher", "WithFeatures", "adamw", "fit"]

Model = TypeVar("Model", bound=nn.Module)


class Batches:
    """A loader whose epochs are ``schedule.steps_per_epoch`` batches, however many rows there are.

    Every pass over the rows is in a new order, which depends on ``seed`` alone.

    Args:
        columns: tensors of one length: (inputs,) without labels, or (inputs, labels).
        schedule: has the batches' size and their number per epoch.
        seed: of the order.
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


class WithFeatures(nn.Module):
    """A ``Sequential`` that returns its logits and the input of its last layer, as ``{"logits", "features"}``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        *body, last = self.model.children()
        features = images
        for layer in body:
            features = layer(features)
        return {"logits": last(features), "features": features}


class PrecomputedTeacher:
    """A teacher whose outputs are computed once, and then looked up by the bytes of an input.

    The outputs are those of ``model`` in evaluation mode, a tensor or a mapping of tensors. Looking them up takes a
    small part of a CNN's time.

    Args:
        model: the teacher.
        inputs: (rows, ...), all that it will be called with.

    Raises:
        KeyError: when it is called with an input that is not one of these.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._outputs: Any = logits_of(model, inputs)
        self._rows = {bytes(one): row for row, one in enumerate(inputs.numpy())}

    def __call__(self, inputs: Tensor) -> Any:
        rows = [self._rows[bytes(one)] for one in inputs.numpy()]
        if isinstance(self._outputs, dict):
            return {name: outputs[rows] for name, outputs in self._outputs.items()}
        return self._outputs[rows]


def adamw(schedule: Schedule) -> Callable[[Iterable[nn.Parameter]], AdamW]:
    """The function from parameters to an AdamW of the schedule's rate and decay, as ``Distiller`` takes it."""
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
    """Train a model and return it as the last step left it.

    Args:
        model: is trained in place.
        columns: (inputs,) or (inputs, labels).
        schedule: epochs, batches and learning rate.
        seed: of the batches' order.
        teacher: as ``Distiller`` takes it.
        options: ``Distiller``'s others, such as ``objective``.
    """
    distiller = Distiller(model, teacher, optimizer=adamw(schedule), schedule="cosine", **options)
    distiller.fit(Batches(columns, schedule, seed), epochs=schedule.epochs, progress=False)
    return model
