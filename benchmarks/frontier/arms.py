"""What the students are trained from: each arm's codec, or why it has none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARMS", "Arm"]


@dataclass(frozen=True)
class Arm:
    """Labels of one kind.

    ``codec`` None: no stored labels. ``fresh``: drawn anew for each epoch. ``renormalise``: top-k without its tail.
    ``shapes``: how many a prototype chooses from. ``residual``: so many signed draws of what a prototype misses.
    """

    codec: str | None
    options: dict[str, Any] = field(default_factory=dict)
    shapes: int = 0
    residual: int = 0
    fresh: bool = False
    renormalise: bool = False


def prototype(k: int, shapes: int, residual: int = 0) -> Arm:
    return Arm("prototype", {"k": k}, shapes=shapes, residual=residual)


# In the order in which they are trained, so that a run that is cut short has the most telling ones.
ARMS: dict[str, Arm] = {
    "dense": Arm(None),
    "none": Arm(None),
    "prototype-1": prototype(1, 256),
    "sample-50": Arm("sample", {"draws": 50}),
    "prototype-3": prototype(3, 256),
    "sample-23": Arm("sample", {"draws": 23}),
    "topk-4-tail": Arm("topk", {"k": 4}),
    "prototype-0": prototype(0, 256),
    "threshold-.05": Arm("threshold", {"tau": 0.05}),
    "sample-23-fresh": Arm("sample", {"draws": 23}, fresh=True),
    "topk-4": Arm("topk", {"k": 4}, renormalise=True),
    "prototype-9": prototype(9, 256),
    "prototype-1-of-64": prototype(1, 64),
    "prototype-1-of-1024": prototype(1, 1024),
    "sample-10": Arm("sample", {"draws": 10}),
    "threshold-.02": Arm("threshold", {"tau": 0.02}),
    "threshold-.1": Arm("threshold", {"tau": 0.1}),
    "threshold-.05-fresh": Arm("threshold", {"tau": 0.05}, fresh=True),
    "prototype-1-and-8-drawn": prototype(1, 256, residual=8),
}
