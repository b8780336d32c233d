"""Measuring, while a cache is written, how far its labels lie from the teacher's rows: of some, spread over all.

Which rows is a matter of how many the writer's name has written before, whatever the sessions: the first 256, and then
ever fewer, so that a million rows take 2,400 measurements and a billion 4,200. The row number n stands for n / 256.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import Codec
from kdfast.cache.format.floor import FloorSums
from kdfast.labels import SoftLabels

__all__ = ["measure", "measured_rows"]

DENSE = 256  # rows that are all measured, and then as many per e-fold of rows
GRID = 2.0**-24  # nats


def measure(codec: Codec, rows: Tensor, labels: SoftLabels, before: int) -> FloorSums | None:
    """The floor of a record's labels; None where none of its rows is to be measured, or the codec's have no floor.

    Args:
        codec: the codec.
        rows: (rows, columns) what it was given.
        labels: what it has selected, on the CPU.
        before: how many rows this writer's name has written before.
    """
    if codec.drawn:
        return None
    chosen = measured_rows(before, len(labels))
    if not len(chosen):
        return None
    index = torch.from_numpy(chosen)
    found = codec.distances(rows[index.to(rows.device)], labels[index])
    if found is None:
        return None
    weight = np.maximum(1.0, (before + chosen + 1) / DENSE)
    # On a grid: the last digits depend on how many threads have summed a row up, and what is on disk must not.
    parts = [np.rint(column.cpu().numpy() / GRID) * GRID for column in found]
    columns = np.stack([weight, *parts])
    known = columns[:, ~np.isnan(columns).any(0)]  # a product with the output layer may overflow
    return FloorSums.of(*known) if known.size else None


def measured_rows(before: int, count: int) -> NDArray[np.int64]:
    """Choose the rows of a record whose labels are compared with the teacher's rows.

    Args:
        before: how many rows were written before the record.
        count: how many the record has.

    Returns:
        Their numbers within the record, ascending: all of the first 256 rows of a writer, and ever fewer after them.
    """
    if not count or math.floor(_measured(before)) == math.floor(_measured(before + count)):
        return np.empty(0, np.int64)
    after = np.arange(before, before + count + 1)
    so_far = np.floor([_measured(n) for n in after.tolist()])
    return np.flatnonzero(so_far[1:] > so_far[:-1])


def _measured(rows: int) -> float:
    """How many of the first ``rows`` rows are measured, before rounding down."""
    return float(rows) if rows <= DENSE else DENSE * (1 + math.log(rows / DENSE))
