"""Turning top-k log-probabilities into labels, whose tail is what the entries leave of 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast.cache.convert.source import Record
from kdfast.cache.errors import CacheError
from kdfast.labels import SoftLabels

__all__ = ["ImportedRows", "to_rows"]


@dataclass(frozen=True)
class ImportedRows:
    """The labels of one record, ready to be stored, and how they came out.

    ``mass`` is the probability that each row keeps, before it is capped at 1.
    """

    labels: SoftLabels
    mass: NDArray[np.float64]
    row: NDArray[np.int64]  # (entries kept,): the row of each
    ids: NDArray[np.int64]  # (entries kept,)


def to_rows(record: Record, *, vocab_size: int, k: int, value_dtype: str, tolerance: float) -> ImportedRows:
    """Labels of the ``k`` largest entries of each row, largest first, with log1p(-their probability) as the tail.

    Raises:
        CacheError: a row is broken; the message names record, row and fault.
    """
    counts = record.counts
    row = np.repeat(np.arange(len(counts)), counts)
    entry = record.log_probs > -np.inf  # NaN is neither: it is a fault, found below
    entry |= np.isnan(record.log_probs)
    row, ids, values = row[entry], record.ids[entry], record.log_probs[entry]
    if not ((np.diff(values) <= 0) | (np.diff(row) > 0)).all():  # mostly they are in order, and sorting is slow
        order = np.lexsort((-values, row))
        ids, values = ids[order], values[order]
    _check(record, row, ids, values, vocab_size, tolerance)

    first = np.searchsorted(row, np.arange(len(counts)))
    kept = np.arange(len(row)) - first[row] < k
    # What the value type cannot hold stays in the tail.
    kept &= values >= np.finfo(value_dtype).min
    row, ids, values = row[kept], ids[kept], values[kept].clip(max=0.0)
    mass = np.bincount(row, np.exp(values), minlength=len(counts)).astype(np.float64)
    with np.errstate(divide="ignore"):
        tails = np.log1p(-mass.clip(max=1.0))
    offsets = np.searchsorted(row, np.arange(len(counts) + 1))
    labels = SoftLabels.topk(
        torch.from_numpy(ids),
        torch.from_numpy(values),
        torch.from_numpy(tails),
        vocab_size=vocab_size,
        offsets=torch.from_numpy(offsets),
    )
    return ImportedRows(labels, mass, row, ids)


def _check(
    record: Record,
    row: NDArray[np.int64],
    ids: NDArray[np.int64],
    values: NDArray[np.float64],
    vocab_size: int,
    tolerance: float,
) -> None:
    """Raise ``BrokenRowError`` for the first row that is not a valid top-k distribution."""
    rows = len(record.counts)
    limit = np.log1p(tolerance)
    faults: list[tuple[int, str]] = []
    for at in np.flatnonzero(~(values <= limit))[:1]:
        faults.append((int(row[at]), f"a log-probability of {values[at]:g}"))
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    for at in outside[:1]:
        faults.append((int(row[at]), f"id {ids[at]} is outside the vocabulary of {vocab_size}"))
    following = record.token_ids[1 : rows + 1]
    for at in np.flatnonzero(following >= vocab_size)[:1]:
        faults.append((int(at), f"the token after it, {following[at]}, is outside the vocabulary of {vocab_size}"))
    for at in np.flatnonzero(np.bincount(row, minlength=rows) == 0)[:1]:
        faults.append((int(at), "no entry"))
    places = np.sort(row * vocab_size + ids) if not len(outside) else np.empty(0, np.int64)
    for place in places[:-1][np.diff(places) == 0][:1].tolist():
        faults.append((place // vocab_size, f"id {place % vocab_size} occurs twice"))
    mass = np.bincount(row, np.exp(values.clip(max=700.0)), minlength=rows)
    for at in np.flatnonzero(mass > 1 + tolerance)[:1]:
        faults.append((int(at), f"probabilities add up to {mass[at]:.6g}, where at most {1 + tolerance:g} is credible"))
    if faults:
        number, fault = min(faults)
        raise BrokenRowError(f"{record.name}: row {number}: {fault}")


class BrokenRowError(CacheError):
    """A row is not a valid top-k distribution."""
