"""What is run, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FINAL", "TUNING", "Options", "Run", "RunKey"]

TUNING, FINAL = "tuning", "final"  # scored on the validation split, or on the test split

Options = Mapping[str, Any]
RunKey = tuple[str, str, str, int, str]


@dataclass(frozen=True)
class Run:
    """One arm under one seed and one choice of its options."""

    arm: str
    stage: str
    seed: int
    options: Options
    settings: str  # their fingerprint
    scores: Mapping[str, float] = field(default_factory=dict)  # by test, in 0 ... 1; empty: not run yet
    about: Mapping[str, Any] = field(default_factory=dict)  # seconds, machine, versions, commit

    @property
    def key(self) -> RunKey:
        """Equal for runs that need not both be made."""
        return self.settings, self.arm, self.stage, self.seed, json.dumps(dict(self.options), sort_keys=True)
