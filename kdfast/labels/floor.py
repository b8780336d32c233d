"""``Floor``: how near to its teacher a student of stored labels can come."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Floor"]


class Floor(NamedTuple):
    """How far a cache's labels lie from the rows that they stand for, measured on a sample of these; in nats.

    A label that keeps a few bytes of a row is another distribution than the row. A student that learns it perfectly
    ends as far from the teacher as the label does, and one that begins nearer is pulled away. Draws are another matter:
    on average they are the row itself, so that they have noise and no floor.
    """

    kl: float  # mean KL(teacher's row || label's); inf where labels rule out what the teacher allows
    standard_error: float  # of it, over rows; 0 of a single one
    entropy: float  # mean of the teacher's rows'
    left_open: float  # what labels whose tail is one class say nothing about: KL of the tail's shape from an even one
    rows: int  # that were measured
    temperature: float  # of the teacher, at which all this is

    @property
    def share(self) -> float:
        """The floor over the rows' entropy."""
        return self.kl / self.entropy if self.entropy else math.inf if self.kl else 0.0

    def text(self) -> str:
        """The floor in words."""
        if math.isinf(self.kl):
            found = "infinite: labels rule out columns that the teacher allows"
        elif self.kl < 5e-7:
            found = "below 1e-6 nats"
        else:
            found = f"{self.kl:.2g} ± {self.standard_error:.1g} nats, {100 * self.share:.2g} % of the rows' entropy"
        if self.left_open:
            found += f"; the tail's shape, {self.left_open:.2g} nats, is left open"
        return f"{found} (KL(teacher || label), {self.rows:,} rows measured)"
