"""The frontier's arms: which labels students are trained from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARMS", "LabelSource"]


@dataclass(frozen=True)
class LabelSource:
    """What one arm's students are trained from.

    Attributes:
        codec: of the stored labels; None where none are stored.
        options: the codec's.
        prototypes: how many a label chooses from, for the codec ``prototype``.
        residual: how many signed draws are stored of what the prototype misses.
        fresh: whether labels are drawn anew for each epoch.
        renormalise: whether top-k labels are scaled up to a mass of 1, and have no tail.
    """

    codec: str | None
    options: dict[str, Any] = field(default_factory=dict)
    prototypes: int = 0
    residual: int = 0
    fresh: bool = False
    renormalise: bool = False


def prototype(k: int, prototypes: int, residual: int = 0) -> LabelSource:
    return LabelSource("prototype", {"k": k}, prototypes=prototypes, residual=residual)


# In the order in which they are trained, so that a run that is cut short has the most telling ones.
ARMS: dict[str, LabelSource] = {
    "dense": LabelSource(None),
    "none": LabelSource(None),
    "prototype-1": prototype(1, 256),
    "sample-50": LabelSource("sample", {"draws": 50}),
    "prototype-3": prototype(3, 256),
    "sample-23": LabelSource("sample", {"draws": 23}),
    "topk-4-tail": LabelSource("topk", {"k": 4}),
    "prototype-0": prototype(0, 256),
    "threshold-.05": LabelSource("threshold", {"tau": 0.05}),
    "sample-23-fresh": LabelSource("sample", {"draws": 23}, fresh=True),
    "sample-5": LabelSource("sample", {"draws": 5}),
    "topk-16-tail": LabelSource("topk", {"k": 16}),
    "topk-4": LabelSource("topk", {"k": 4}, renormalise=True),
    "prototype-9": prototype(9, 256),
    "prototype-1-of-64": prototype(1, 64),
    "prototype-1-of-1024": prototype(1, 1024),
    "sample-10": LabelSource("sample", {"draws": 10}),
    "threshold-.02": LabelSource("threshold", {"tau": 0.02}),
    "threshold-.1": LabelSource("threshold", {"tau": 0.1}),
    "threshold-.05-fresh": LabelSource("threshold", {"tau": 0.05}, fresh=True),
    "prototype-1-and-8-drawn": prototype(1, 256, residual=8),
    "systematic-5": LabelSource("sample", {"draws": 5, "sampling": "systematic"}),
    "systematic-8": LabelSource("sample", {"draws": 8, "sampling": "systematic"}),
    "systematic-10": LabelSource("sample", {"draws": 10, "sampling": "systematic"}),
    "systematic-23": LabelSource("sample", {"draws": 23, "sampling": "systematic"}),
}
