"""A student that is small in the beginning and large in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdfast.distill.distiller import Distiller
from kdfast.distill.fields import split, to_device
from kdfast.models import apply, evaluating, logits_of
from kdfast.recipes._rounds import History, check_options

__all__ = ["Growing"]


class Growing:
    """Distils a small student first, lets it grow, and distils what it has become.

        growing = Growing(small, teacher, grow=lambda model: deepen(widen(model, 0, 64), 0))
        growing.fit(loader, epochs=20, at=0.5)
        growing.student   # the large one

    The article swaps in a fresh large model at half time, which throws the first half away. Here growth must keep the
    function, as ``widen`` and ``deepen`` do (Net2Net, Chen et al. 2016), and ``fit`` looks whether it has.

    Args:
        student, teacher: as ``Distiller`` takes them.
        grow: of the trained student, makes the next one.
        options: ``Distiller``'s and ``KD``'s, of both phases; ``folder`` has one per phase inside.

    Raises:
        TypeError: an optimizer that exists already.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        grow: Callable[[Any], nn.Module],
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        check_options(options)
        self.student, self.teacher, self.grow = student, teacher, grow
        self._folder, self._options = folder, options

    def fit(self, loader: Iterable[Any], *, epochs: int, at: float = 0.5, **plan: Any) -> tuple[History, History]:
        """``round(epochs * at)`` epochs before growth, the others after it. Returns both histories.

        Raises:
            ValueError: a phase without an epoch, or growth that changes what the student says of a batch.
        """
        first = round(epochs * at)
        if not 0 < first < epochs:
            raise ValueError(f"both phases need an epoch, got {first} and {epochs - first} of {epochs} at {at}")
        small = self._distiller(self.student, "small")
        before = small.fit(loader, epochs=first, **plan)
        self.student = self.grow(self.student)
        large = self._distiller(self.student, "large")
        _check_function(small, large, next(iter(loader)))
        return before, large.fit(loader, epochs=epochs - first, **plan)

    def _distiller(self, student: nn.Module, phase: str) -> Distiller:
        folder = None if self._folder is None else Path(self._folder) / phase
        return Distiller(student, self.teacher, folder=folder, **self._options)


@torch.no_grad()
def _check_function(small: Distiller, large: Distiller, batch: Any) -> None:
    arguments = small.fields.arguments(split(to_device(batch, small.device))[0])
    with evaluating(small.student), evaluating(large.student):
        # Without the distillers' autocast, whose rounding alone is more than what is allowed here.
        old, new = (logits_of(apply(x.student, arguments)) for x in (small, large))
    # What remains is rounding: sums of other lengths, in another order.
    if old.shape != new.shape or not bool((old - new).abs().amax() <= 1e-3 * old.abs().amax()):
        raise ValueError("growth changed what the student has learned: grow it by widen and deepen, or alike")
