"""Counting what imported labels leave out, over all rows, and reporting it in words."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.convert.source import Record

__all__ = ["BiasReport"]

# By which share of the rows another alignment must fit better to be mentioned: less than that is chance.
MARGIN = 0.1
BINS = 10_000  # of the histogram of kept mass, over [0, 1]


@dataclass
class BiasReport:
    """Counts over imported rows. ``lines`` puts into words what they mean for training."""

    what: str = ""
    heads: bool = True  # the rows are heads of distributions; False: whole ones, which leave nothing out
    records: int = 0
    rows: int = 0
    entries: int = 0
    duplicates: int = 0
    dropped: list[str] = field(default_factory=list)  # records left out, with the reason
    above_one: int = 0  # rows whose probabilities add up to more than 1, within the tolerance
    scale: float = 0.0  # sum of 1 / mass
    mass: float = 0.0  # sum of kept mass
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS + 1, np.int64))
    targets: int = 0  # rows whose next token is known
    hits: int = 0  # rows whose next token is an entry
    # For alignments that are off by so many tokens: rows whose next token would be an entry.
    shifted: dict[int, int] = field(default_factory=lambda: {-1: 0, 1: 0})

    def count(self, mass: NDArray[np.float64], entries: int) -> None:
        """Count one record: the probability ``mass`` that each of its rows keeps, and its entries."""
        self.records += 1
        self.rows += len(mass)
        self.entries += entries
        self.above_one += int((mass > 1).sum())
        capped = mass.clip(max=1.0)
        self.mass += float(capped.sum())
        self.scale += float((1 / mass).sum())
        self.histogram += np.bincount((capped * BINS).astype(np.int64), minlength=BINS + 1)

    def count_targets(self, record: Record, row: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Count the rows that hold the token that came next, and those that hold its neighbours instead."""
        hits = {shift: _hits(record.token_ids, row, ids, len(record.counts), 1 + shift) for shift in (-1, 0, 1)}
        # Rows that all three can be asked about, so that the rates compare.
        asked = min(len(hit) for hit in hits.values())
        self.targets += asked
        self.hits += int(hits[0][:asked].sum())
        for shift in self.shifted:
            self.shifted[shift] += int(hits[shift][:asked].sum())

    @property
    def mean_mass(self) -> float:
        """The mean probability that a row keeps."""
        return self.mass / max(self.rows, 1)

    @property
    def median_mass(self) -> float:
        """The median probability that a row keeps, to within 1e-4."""
        if not self.rows:
            return 0.0
        return float(np.searchsorted(self.histogram.cumsum(), (self.rows + 1) // 2)) / BINS

    @property
    def mean_scale(self) -> float:
        """The factor by which renormalising would scale the entries up: the mean of 1 / mass."""
        return self.scale / max(self.rows, 1)

    @property
    def missing_targets(self) -> float | None:
        """The share of rows of which the next token is no entry; None where next tokens are not known."""
        return 1 - self.hits / self.targets if self.targets else None

    @property
    def misaligned(self) -> int | None:
        """The shift in tokens that fits the rows better than the alignment used; None if that fits best."""
        best = max(self.shifted, key=lambda shift: self.shifted[shift])
        return best if self.shifted[best] - self.hits > MARGIN * self.targets else None

    def lines(self) -> list[str]:
        """The report in words, a list of lines."""
        lines = [f"{self.records:,} records, {self.rows:,} rows"]
        if self.heads:
            lines[0] += f", {self.entries / max(self.rows, 1):.1f} entries per row"
        if self.duplicates:
            lines.append(f"{self.duplicates:,} records had a key that was there already: the first one stays")
        if not self.rows or not self.heads:
            return lines + self._dropped()
        left = 1 - self.mean_mass
        lines.append(
            f"the entries hold {self.mean_mass:.2%} of the teacher's probability on average ({self.median_mass:.2%} in "
            f"the median row); the other {left:.2%} is stored as one tail mass per row: how much is known, on which "
            f"tokens it lay is not"
        )
        lines.append(
            f"a loss that renormalised the entries instead would teach them {self.mean_scale:.3g} times the teacher's "
            f"probability on average, and that all other tokens are impossible; kd_loss keeps the tail as a class"
        )
        if self.above_one:
            lines.append(
                f"{self.above_one:,} rows ({self.above_one / self.rows:.2%}) add up to slightly more than 1, which "
                f"rounding does: stored without a tail"
            )
        return lines + self._targets() + self._dropped()

    def _targets(self) -> list[str]:
        if self.missing_targets is None:
            return []
        lines = [f"the token that came next is missing from the entries of {self.missing_targets:.2%} of the rows"]
        if self.misaligned is not None:
            rate = self.shifted[self.misaligned] / self.targets
            lines.append(
                f"WARNING: the rows look shifted: the token {abs(self.misaligned)} "
                f"{'later' if self.misaligned > 0 else 'earlier'} is among the entries of {rate:.2%} of the rows, the "
                f"next one of {1 - self.missing_targets:.2%}. Check the alignment before training on this cache"
            )
        return lines

    def _dropped(self) -> list[str]:
        if not self.dropped:
            return []
        return [f"{len(self.dropped):,} records were left out because of a broken row, the first: {self.dropped[0]}"]


def _hits(
    tokens: NDArray[np.int64], row: NDArray[np.int64], ids: NDArray[np.int64], rows: int, ahead: int
) -> NDArray[np.bool_]:
    """(n,) bool: whether the token i + ``ahead`` is an entry of row i, for each row i that has such a token."""
    asked = max(0, min(rows, len(tokens) - ahead))
    within = row < asked
    found = ids[within] == tokens[row[within] + ahead]
    return np.bincount(row[within], found, minlength=asked) > 0
