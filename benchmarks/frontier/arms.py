"""What the students are trained from: each arm's codec, or why it has none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARMS", "Arm"]


@dataclass(frozen=True)
class Arm:
    """Labels of one kind.

    ``codec`` None: no stored labels. ``fresh``: drawn anew for each epoch. ``renormalise``: top-k without its tail.
    ``shapes``: how many a prototype chooses from.
    """

    codec: str | None
    options: dict[str, Any] = field(default_factory=dict)
    shapes: int = 0
    fresh: bool = False
    renormalise: bool = False


# In the order in which they are trained, so that a run that is cut short has the most telling ones.
ARMS: dict[str, Arm] = {
    "dense": Arm(None),
    "none": Arm(None),
    "prototype-3": Arm("prototype", {"k": 3, "tail_step": 0.5, "share_step": 0.5}, shapes=256),
    "sample-50": Arm("sample", {"draws": 50}),
    "prototype-1": Arm("prototype", {"k": 1, "tail_step": 0.5, "share_step": 0.5}, shapes=256),
    "sample-23": Arm("sample", {"draws": 23}),
    "topk-4-tail": Arm("topk", {"k": 4}),
    "threshold-.05": Arm("threshold", {"tau": 0.05}),
    "prototype-9": Arm("prototype", {"k": 9, "tail_step": 0.5, "share_step": 0.5}, shapes=256),
    "prototype-3-of-1024": Arm("prototype", {"k": 3, "tail_step": 0.5, "share_step": 0.5}, shapes=1024),
    "topk-4": Arm("topk", {"k": 4}, renormalise=True),
    "sample-10": Arm("sample", {"draws": 10}),
    "threshold-.02": Arm("threshold", {"tau": 0.02}),
    "threshold-.1": Arm("threshold", {"tau": 0.1}),
    "topk-9-tail": Arm("topk", {"k": 9}),
    "prototype-3-of-64": Arm("prototype", {"k": 3, "tail_step": 0.5, "share_step": 0.5}, shapes=64),
    "sample-23-fresh": Arm("sample", {"draws": 23}, fresh=True),
    "threshold-.05-fresh": Arm("threshold", {"tau": 0.05}, fresh=True),
}
