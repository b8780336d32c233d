"""``Combined``: a weighted sum of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdfast.distill.step import Objective, Step
from kdfast.recipes._rows import decoded

__all__ = ["Combined"]


class Combined(nn.Module):
    """``sum(weight * objective(step))``, such as KD and a relation loss beside it.

        Combined(KD(temperature=4.0), GraphAttention(), weights=(1.0, 0.1))

    Args:
        objectives: one or more. What a module among them has to train or to remember goes with the sum.
        weights: one per objective; all 1 without.

    Raises:
        ValueError: no objective, or another number of weights.
    """

    def __init__(self, *objectives: Objective, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not objectives:
            raise ValueError("Combined needs at least one objective, got none")
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(objectives)
        if len(self.weights) != len(objectives):
            raise ValueError(f"{len(objectives)} objectives need as many weights, got {len(self.weights)}")
        self.objectives = objectives
        self.options: dict[str, Any] = next((x.options for x in objectives if hasattr(x, "options")), {})
        self.modules_among_them = nn.ModuleList(x for x in objectives if isinstance(x, nn.Module))

    def forward(self, step: Step) -> Tensor:
        step = decoded(step)
        terms = [weight * part(step) for weight, part in zip(self.weights, self.objectives, strict=True)]
        return sum(terms[1:], terms[0])
