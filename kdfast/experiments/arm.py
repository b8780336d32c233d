"""An arm: one way to train a student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from kdfast.experiments.runs import Options

__all__ = ["TEMPERATURES", "Arm", "grid"]


@dataclass(frozen=True)
class Arm:
    """What an arm is called, and how it makes a student of a task.

    Attributes:
        train: ``train(task, **options)`` returns the trained student.
        candidates: the options to choose from on the validation split, as many for every arm of an experiment; the
            first ones are taken where nothing is tuned.
        bound: it has labels that the others may not have, and is shown without being compared.
    """

    name: str
    title: str
    train: Callable[..., nn.Module]
    candidates: tuple[Options, ...]
    bound: bool = False


def grid(**values: list[Any]) -> tuple[Options, ...]:
    """Every combination: ``grid(a=[1, 2], b=[3])`` is ``({"a": 1, "b": 3}, {"a": 2, "b": 3})``."""
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


TEMPERATURES = grid(temperature=[1.0, 2.0, 4.0, 8.0])
