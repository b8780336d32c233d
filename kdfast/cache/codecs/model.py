"""The model of an entry codec: the frequencies of its symbols, and the order of ids where no prototype gives one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast._C import EntryModel, count_symbols

__all__ = ["IdOrder", "Statistics", "pack_statistics", "unpack_statistics"]

SLOTS = 4096
ESCAPE = 255
RANK_CONTEXTS = VALUE_CONTEXTS = 24 * 12  # octave of a rank, how much of the row is left
BLEND = 8.0  # how many observations the law of all contexts of a kind counts for in each of them
FEW = 128  # a context with fewer observations has that law alone
UNSEEN = 31  # the class of an id without weight; the others are half octaves of weight
CLASSES_PER_OCTAVE = 2
SORTED_AT_ONCE = 2**18  # ids


@dataclass(frozen=True)
class IdOrder:
    """Ids by rank and ranks by id, for each of the orders that a row may be coded in: (orders, V)."""

    ids: NDArray[np.int32]

    @cached_property
    def ranks(self) -> NDArray[np.int32]:
        """Ranks by id: for encoding alone, so that a reader never makes them."""
        ranks = np.empty_like(self.ids)
        np.put_along_axis(ranks, self.ids.astype(np.int64), np.arange(self.ids.shape[1], dtype=np.int32)[None], axis=1)
        return ranks

    @classmethod
    def by_class(cls, classes: NDArray[np.uint8]) -> IdOrder:
        """The one order of ids by class, then by id. It takes no more memory than its result, and some MB."""
        ids = np.empty(len(classes), np.int32)
        ends = np.bincount(classes, minlength=UNSEEN + 1).cumsum()
        ends -= np.bincount(classes, minlength=UNSEEN + 1)
        for start in range(0, len(classes), SORTED_AT_ONCE):
            chunk = classes[start : start + SORTED_AT_ONCE]
            order, counts = np.argsort(chunk, kind="stable"), np.bincount(chunk, minlength=UNSEEN + 1)
            # Number n of the sorted chunk goes to its class's end so far, and as far on as it is in its class.
            ids[np.arange(len(chunk)) + np.repeat(ends - (counts.cumsum() - counts), counts)] = order + start
            ends += counts
        return cls(ids[None])


def id_classes(ids: NDArray[np.int32], weights: NDArray[np.float32], vocab_size: int) -> NDArray[np.uint8]:
    """(V,): how many half octaves of weight each id lies below the heaviest one; ``UNSEEN`` if it has none."""
    mass = np.bincount(ids, weights, vocab_size)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 where there is no weight at all
        below = np.floor(CLASSES_PER_OCTAVE * np.log2(mass.max(initial=0.0) / mass))
    return np.where(mass > 0, below.clip(0, UNSEEN - 1), UNSEEN).astype(np.uint8)


@dataclass(frozen=True)
class Statistics:
    """Frequencies by context, (contexts, 256), each summing to 4096; and the classes that order ids, (V,)."""

    frequencies: NDArray[np.uint16]
    classes: NDArray[np.uint8] | None

    @classmethod
    def of(cls, counts: NDArray[np.uint32], header_fields: int, classes: NDArray[np.uint8] | None) -> Statistics:
        """Frequencies from the (contexts, 256) ``counts`` of each symbol in each context."""
        parts = [
            _frequencies(part)
            for part in (
                *(counts[c : c + 1] for c in range(header_fields)),
                counts[header_fields : header_fields + RANK_CONTEXTS],
                counts[header_fields + RANK_CONTEXTS :],
            )
        ]
        return cls(np.concatenate(parts), classes)

    def entry_model(self, header_fields: int, total: int) -> EntryModel:
        """The entropy coder of these frequencies. ``total``: what a row's values, each plus 1, add up to; 0: varies."""
        return EntryModel(header_fields, total, self.frequencies)


def _frequencies(counts: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Smoothed frequencies of contexts of one kind: each one's counts, and a few of the sum over all."""
    overall = counts.sum(0, dtype=np.float64)
    if not overall.sum():
        overall[ESCAPE] = 1
    overall /= overall.sum()
    law = _to_slots(overall)
    return np.stack([_to_slots(row + BLEND * overall) if row.sum() >= FEW else law for row in counts])


def _to_slots(weights: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Integer frequencies that sum to 4096, at least 1 for the escape and for each symbol of some weight."""
    weights = weights / weights.sum()
    wanted = (weights * SLOTS >= 0.25) | (np.arange(256) == ESCAPE)
    slots = np.where(wanted, np.maximum(np.rint(weights * SLOTS), 1), 0).astype(np.int64)
    while (excess := int(slots.sum()) - SLOTS) > 0:  # the largest pay for the ones rounded up
        largest = int(slots.argmax())
        slots[largest] -= min(excess, max(1, int(slots[largest]) // 16))
    slots[slots.argmax()] -= excess
    return slots.astype(np.uint16)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def pack_statistics(statistics: Statistics) -> bytes:
    """The bytes of a model: its tables of frequencies, then the classes, if there are any.

    The classes are an entry block of V rows without entries, whose header field 1 is the class, after its own tables.
    """
    out = _pack_tables(statistics.frequencies)
    if statistics.classes is None:
        return out
    headers, empty = _class_headers(statistics.classes), np.empty(0, np.int32)
    counts = count_symbols(headers, empty, empty, 0)
    own = Statistics.of(counts, 2, None)
    return out + _pack_tables(own.frequencies) + own.entry_model(2, 0).encode(headers, empty, empty)


def unpack_statistics(data: bytes, header_fields: int, vocab_size: int | None) -> Statistics:
    """Read what ``pack_statistics`` gave. Raises ``ValueError`` for other bytes.

    Args:
        vocab_size: how many classes there are; None if there are none.
    """
    frequencies, at = _unpack_tables(data, 0, header_fields + RANK_CONTEXTS + VALUE_CONTEXTS)
    if vocab_size is None:
        if at != len(data):
            raise ValueError(f"a model has {len(data) - at} bytes too many")
        return Statistics(frequencies, None)
    own, at = _unpack_tables(data, at, 2 + RANK_CONTEXTS + VALUE_CONTEXTS)
    classes = EntryModel(2, 0, own).decode_field(np.frombuffer(data, np.uint8)[at:], vocab_size, 1)
    if int(classes.max()) > UNSEEN:
        raise ValueError(f"a model has an id of class {classes.max()}, above {UNSEEN}")
    return Statistics(frequencies, classes)


def _class_headers(classes: NDArray[np.uint8]) -> NDArray[np.int32]:
    return np.stack([np.zeros(len(classes), np.int32), classes.astype(np.int32)], 1)


TABLE_ENTRY = np.dtype([("symbol", "u1"), ("slots", "<u2")])


def _pack_tables(frequencies: NDArray[np.uint16]) -> bytes:
    """The distinct tables and each context's number of one, laid out as FORMAT.md describes."""
    distinct, which = np.unique(frequencies, axis=0, return_inverse=True)
    out = [np.array(len(distinct), "<u2").tobytes()]
    for row in distinct:
        symbols = np.flatnonzero(row)
        table = np.empty(len(symbols), TABLE_ENTRY)
        table["symbol"], table["slots"] = symbols, row[symbols]
        out += [bytes([len(symbols) - 1]), table.tobytes()]
    return b"".join(out) + which.reshape(-1).astype("<u2").tobytes()


def _unpack_tables(data: bytes, at: int, contexts: int) -> tuple[NDArray[np.uint16], int]:
    """(contexts, 256) frequencies that ``_pack_tables`` laid out at ``at``, and where they end."""
    distinct = np.zeros((int(_take(data, at, "<u2", 1)[0]), 256), np.uint16)
    at += 2
    for row in distinct:
        symbols = int(_take(data, at, "u1", 1)[0]) + 1
        table = _take(data, at + 1, TABLE_ENTRY, symbols)
        row[table["symbol"]] = table["slots"]
        at += 1 + table.nbytes
    which = _take(data, at, "<u2", contexts)
    if int(which.max(initial=0)) >= len(distinct):
        raise ValueError("a model refers to a table that it lacks")
    return distinct[which], at + which.nbytes


def _take(data: bytes, at: int, dtype: np.dtype[Any] | str, count: int) -> NDArray[Any]:
    end = at + count * np.dtype(dtype).itemsize
    if end > len(data):
        raise ValueError("a model is cut short")
    return np.frombuffer(data[at:end], dtype)
