"""Spans: parts of records, and rows that no record has, as training on packed documents needs them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import groupby
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.format.keys import describe

__all__ = ["Span", "check_several", "check_spans", "mask_spans", "pack_spans", "split_spans"]

# A key, a first row, and a number of rows. The key None stands for rows that are absent.
Span = tuple[Any, int, int]


def pack_spans(
    lengths: Sequence[int], row_length: int, *, seam: int = 0, split: bool = False
) -> list[list[tuple[int | None, int, int]]]:
    """Pack documents into training rows of ``row_length`` tokens.

    Each row is a list of spans (document, start, length) that fill it: documents are numbered as in ``lengths``, and
    padding is a span of document None. A loader packs the tokens by it, and with keys in place of the numbers
    ``CacheReader.gather`` gives the labels, padding being absent.

    Args:
        lengths: tokens of each document.
        row_length: tokens of a row.
        seam: so many positions at the end of each document have no label: 1 where a document's last token would have
            to predict the first one of its neighbour.
        split: cut documents at the ends of rows, in order, so that only the last row has padding. Otherwise a
            document goes whole into the fullest row that has room for it, and only one that is longer than a row is
            cut.

    Raises:
        ValueError: a length or ``seam`` is negative, or ``row_length`` not positive.
    """
    if row_length < 1 or seam < 0 or any(length < 0 for length in lengths):
        raise ValueError(
            f"lengths and seam must not be negative and row_length must be positive, got a shortest length of "
            f"{min(lengths, default=0)}, seam {seam} and row_length {row_length}"
        )
    rows = _BinPacker(row_length)
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            row = rows.open_row() if split else rows.fitting(length - start)
            size = min(length - start, rows.free[row])
            labelled = max(0, min(start + size, length - seam) - start)
            rows.put(row, [(document, start, labelled), (None, 0, size - labelled)])
            start += size
    for row, free in enumerate(rows.free):
        rows.put(row, [(None, 0, free)])
    return rows.spans


class _BinPacker:
    """Best-fit bin packing: training rows being filled, found by the room that they have left."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.spans: list[list[tuple[int | None, int, int]]] = []
        self.free: list[int] = []
        self._by_free: dict[int, list[int]] = {}
        self._sizes = 0  # bit n is set if a row has room for n: a search is two operations

    def fitting(self, size: int) -> int:
        """The number of the fullest row with room for ``size`` (at most a whole row), or of a new one."""
        wanted = min(size, self._length)
        roomy = self._sizes >> wanted << wanted
        if not roomy:
            return self._new()
        return self._by_free[(roomy & -roomy).bit_length() - 1][-1]

    def open_row(self) -> int:
        """The number of the last row, or of a new one if that is full."""
        return len(self.free) - 1 if self.free and self.free[-1] else self._new()

    def put(self, row: int, spans: Sequence[tuple[int | None, int, int]]) -> None:
        """Add the ``spans`` that are not empty to ``row``."""
        self._by_free[self.free[row]].remove(row)
        if not self._by_free[self.free[row]]:
            self._sizes &= ~(1 << self.free[row])
        for span in spans:
            if span[2]:
                self.spans[row].append(span)
                self.free[row] -= span[2]
        self._enter(row)

    def _new(self) -> int:
        self.spans.append([])
        self.free.append(self._length)
        self._enter(len(self.free) - 1)
        return len(self.free) - 1

    def _enter(self, row: int) -> None:
        self._by_free.setdefault(self.free[row], []).append(row)
        self._sizes |= 1 << self.free[row]


def mask_spans(key: Any, mask: Sequence[bool] | NDArray[np.bool_] | Tensor) -> list[Span]:
    """The spans that lay the rows of one record out at the True positions of ``mask``, with absent rows elsewhere.

    So the labels of a padded batch are those of its ``attention_mask``, and those of a cache that was captured with a
    ``mask``, which stores the rows of its True positions alone, are laid out by that mask again::

        spans = [span for key, mask in zip(keys, masks) for span in mask_spans(key, mask)]
        labels = cache.gather(spans)  # as many rows as the masks have positions

    Args:
        key: the record's.
        mask: (positions,) bool, as many True as the record has rows.
    """
    values = mask.tolist() if isinstance(mask, (Tensor, np.ndarray)) else mask
    spans: list[Span] = []
    start = 0
    for kept, run in groupby(map(bool, values)):
        count = sum(1 for _ in run)
        spans.append((key, start, count) if kept else (None, 0, count))
        start += count if kept else 0
    return spans


def check_several(keys: Any, known: Container[Any]) -> None:
    """Raise ``TypeError`` where iterating over ``keys`` would give names of fields, or letters that are not ``known``.

    A text of letters that are keys each is as good as a list of them.
    """
    if isinstance(keys, Mapping):
        raise TypeError(f"keys must be a list of keys, got one {type(keys).__name__}: give one of its fields")
    if isinstance(keys, (str, bytes)) and not all(part in known for part in keys):
        raise TypeError(f"keys must be a list of keys, got one {type(keys).__name__}: give [{describe(keys)}]")


def split_spans(entries: Any) -> tuple[Any, NDArray[np.int64] | None, NDArray[np.bool_]]:
    """Split entries, each a key, a span or None, into keys, spans and a mask of the absent ones.

    Returns:
        The keys of those that are not absent; (n, 2) first row and number of rows, -1 standing for the whole record,
        or None if all entries are keys; (n,) absent.

    Raises:
        TypeError, ValueError: a tuple that is no span, by its key.
    """
    absent = np.zeros(len(entries), bool)
    if not isinstance(entries, list) or not any(entry is None or isinstance(entry, tuple) for entry in entries):
        return entries, None, absent
    keys, spans = [], np.empty((len(entries), 2), np.int64)
    for at, entry in enumerate(entries):
        key, start, length = _span(entry)
        spans[at] = start, length
        absent[at] = key is None
        if key is not None:
            keys.append(key)
    return keys, spans, absent


def _span(entry: Any) -> Span:
    if entry is None:
        return None, 0, 1
    if not isinstance(entry, tuple):
        return entry, 0, -1
    if len(entry) != 3:
        raise ValueError(f"a span is (key, start, length), got {describe(entry)}")
    key, start, length = entry
    start, length = index(start), index(length)
    if start < 0 or length < 0 or (key is None and start):
        raise ValueError(f"span {_describe(key, start, length)} must not start or end before its record")
    return key, start, length


def check_spans(entries: Sequence[Any], spans: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
    """Raise ``ValueError`` for a span that goes beyond its record's ``rows``, naming its key and range."""
    for at in np.flatnonzero((spans[:, 1] >= 0) & (spans.clip(0).sum(1) > rows))[:1]:
        key, start, length = _span(entries[at])
        raise ValueError(f"span {_describe(key, start, length)} goes beyond the record's {rows[at]} rows")


def _describe(key: Any, start: int, length: int) -> str:
    return f"{start}:{start + length} of {describe(key)}"
