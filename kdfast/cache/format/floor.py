"""``FloorSums``: what a shard says of how far its labels lie from the rows that they stand for.

They are sums over some rows, so that shards, processes and merged caches add up. A row stands for as many as were left
out around it: that is its weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.format.strict import parse_json
from kdfast.labels.floor import Floor

__all__ = ["FLOOR", "LARGEST_FLOOR", "FloorSums"]

FLOOR = "floor"  # the key of a shard's metadata
NUMBER = 1.23456789e-100  # no sum is longer in JSON
MOST_KL = 1e6  # nats: beyond is as good as infinite, and its square has room
MOST = 1e100  # of a sum


@dataclass(frozen=True)
class FloorSums:
    """Sums over the rows that were measured, w being the weight of each, and KL its KL(teacher's row || label's).

    A row whose KL is infinite counts in ``infinite`` and not in the sums of KL.
    """

    rows: int = 0
    weight: float = 0.0  # w
    weight2: float = 0.0  # w^2
    kl: float = 0.0  # w KL
    weight2_kl: float = 0.0  # w^2 KL
    weight2_kl2: float = 0.0  # w^2 KL^2
    infinite: float = 0.0  # w of the rows whose KL is infinite
    entropy: float = 0.0  # w times the row's entropy
    left_open: float = 0.0  # w times what a label leaves open

    @classmethod
    def of(cls, weight: NDArray[Any], kl: NDArray[Any], entropy: NDArray[Any], left_open: NDArray[Any]) -> FloorSums:
        """The sums of some rows, (rows,) float64 each."""
        finite = kl < MOST_KL
        known = np.where(finite, kl, 0.0)
        terms = (
            *(weight, weight**2, weight * known, weight**2 * known, weight**2 * known**2),
            *(weight * ~finite, weight * entropy, weight * left_open),
        )
        return cls(len(weight), *(float(term.sum()) for term in terms))

    @classmethod
    def of_columns(cls, columns: NDArray[np.float64]) -> FloorSums:
        """What ``columns`` were made of."""
        return cls(int(columns[0]), *columns[1:].tolist())

    @classmethod
    def total(cls, parts: Iterable[FloorSums | None]) -> FloorSums | None:
        """The sum of several, None standing for none."""
        known = [part.columns() for part in parts if part is not None]
        if not known:
            return None
        total = np.zeros_like(known[0])
        for part in known:  # one by one, in their order: the last digits do not depend on how they are grouped
            total += part
        return cls.of_columns(total)

    def columns(self) -> NDArray[np.float64]:
        """(9,) the sums as numbers."""
        return np.array(astuple(self), np.float64)

    def floor(self, temperature: float) -> Floor:
        """The mean over all rows that were written, as far as those measured tell."""
        if not self.rows:
            raise ValueError("no row has been measured")
        kl = self.kl / self.weight
        spread = self.weight2_kl2 - 2 * kl * self.weight2_kl + kl * kl * self.weight2
        error = math.sqrt(max(spread, 0.0) * self.rows / max(self.rows - 1, 1)) / self.weight
        entropy, left_open = self.entropy / self.weight, self.left_open / self.weight
        if self.infinite:
            kl, error = math.inf, 0.0
        return Floor(kl, error, entropy, left_open, self.rows, temperature)

    # ---- in a shard's metadata -------------------------------------------------------------------------------------

    def to_metadata(self) -> dict[str, str]:
        """The entry of a shard's metadata, in nine digits, which the order of a sum on some machine does not reach."""
        rows, *sums = astuple(self)
        return {FLOOR: _array([rows, *(float(f"{x:.9g}") for x in sums)])}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], rows: int) -> FloorSums | None:
        """Read what ``to_metadata`` gave; None where nothing was measured.

        Raises:
            ValueError: it is not what a writer of at most ``rows`` rows gives.
        """
        if FLOOR not in metadata:
            return None
        try:
            numbers = parse_json(metadata[FLOOR])
        except ValueError as error:
            raise ValueError(f"its floor cannot be read: {error}") from error
        if not isinstance(numbers, list) or len(numbers) != len(cls().columns()):
            raise ValueError(f"its floor is not the sums of one: {metadata[FLOOR]:.80}")
        count, *sums = numbers
        if type(count) is not int or not 1 <= count <= rows:
            raise ValueError(f"its floor is not of 1 to {rows} rows: {metadata[FLOOR]:.80}")
        possible = all(type(x) is float and 0 <= x < MOST for x in sums)
        if not possible or min(sums[:2]) < 1:  # a row stands for itself at least
            raise ValueError(f"its floor has sums that are impossible: {metadata[FLOOR]:.80}")
        return cls(count, *sums)


def _array(numbers: list[float]) -> str:
    return json.dumps(numbers, separators=(",", ":"))


LARGEST_FLOOR = {FLOOR: _array([2**63, *[NUMBER] * 8])}
