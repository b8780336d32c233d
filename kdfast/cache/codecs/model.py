"""The model of an entry codec: the frequencies its blocks are coded with, and the order of ids where no shape gives one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdfast._C import EntryModel

__all__ = ["IdOrder", "Statistics", "pack_statistics", "unpack_statistics"]

SLOTS = 4096
ESCAPE = 255
RANK_CLASSES, REST_CLASSES, VALUE_REST_CLASSES = 24, 8, 4
RANK_CONTEXTS = RANK_CLASSES * REST_CLASSES
VALUE_CONTEXTS = RANK_CLASSES * VALUE_REST_CLASSES
BLEND = 8.0  # how many observations the law of all contexts of a kind counts for in each of them
UNSEEN = 31  # the class of an id without weight; the others are half octaves of weight
CLASSES_PER_OCTAVE = 2


@dataclass(frozen=True)
class IdOrder:
    """Ids by rank and ranks by id, for each of the orders that a row may be coded in: (orders, V)."""

    ids: NDArray[np.int32]
    ranks: NDArray[np.int32]

    @classmethod
    def of(cls, ids: NDArray[np.int32]) -> IdOrder:
        ranks = np.empty_like(ids)
        np.put_along_axis(ranks, ids.astype(np.int64), np.arange(ids.shape[1], dtype=np.int32)[None], axis=1)
        return cls(ids, ranks)

    @classmethod
    def by_class(cls, classes: NDArray[np.uint8]) -> IdOrder:
        """One order: by class, then by id."""
        return cls.of(np.argsort(classes, kind="stable").astype(np.int32)[None])


def id_classes(ids: NDArray[np.int32], weights: NDArray[np.float32], vocab_size: int) -> NDArray[np.uint8]:
    """(V,): how many half octaves of weight each id lies below the heaviest one; ``UNSEEN`` if it has none."""
    mass = np.bincount(ids, weights, vocab_size)
    with np.errstate(divide="ignore"):
        below = np.floor(CLASSES_PER_OCTAVE * np.log2(mass.max(initial=0.0) / mass))
    return np.where(mass > 0, below.clip(0, UNSEEN - 1), UNSEEN).astype(np.uint8)


@dataclass(frozen=True)
class Statistics:
    """Frequencies by context, (contexts, 256), each summing to 4096; and the classes that order ids, (V,)."""

    frequencies: NDArray[np.uint16]
    classes: NDArray[np.uint8] | None

    @classmethod
    def of(cls, counts: NDArray[np.uint32], columns: int, classes: NDArray[np.uint8] | None) -> Statistics:
        """From how often each symbol has occurred in each context."""
        parts = [
            _frequencies(part)
            for part in (
                *(counts[c : c + 1] for c in range(columns)),
                counts[columns : columns + RANK_CONTEXTS],
                counts[columns + RANK_CONTEXTS :],
            )
        ]
        return cls(np.concatenate(parts), classes)

    def entry_model(self, columns: int) -> EntryModel:
        return EntryModel(columns, self.frequencies)


def _frequencies(counts: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Contexts of one kind: each its own counts, and a few of the sum over all."""
    overall = counts.sum(0, dtype=np.float64)
    if not overall.sum():
        overall[ESCAPE] = 1
    overall /= overall.sum()
    return np.stack([_to_slots(row + BLEND * overall) for row in counts])


def _to_slots(weights: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Whole frequencies that sum to 4096: at least 1 for the escape and for each symbol of some weight."""
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
    """Per context: how many symbols it has, u8 (0 stands for 256), then each one's number, u8, and frequency, u16.

    Then the classes, if there are any: an entry block of V rows without entries, whose column 1 is the class, preceded
    by the frequencies of its contexts in the same form.
    """
    out = [_pack_table(row) for row in statistics.frequencies]
    if statistics.classes is not None:
        columns, empty = _class_columns(statistics.classes), np.empty(0, np.int32)
        counts = np.zeros((2 + RANK_CONTEXTS + VALUE_CONTEXTS, 256), np.uint32)
        counts[0, 0], counts[1] = len(columns), np.bincount(columns[:, 1], minlength=256)
        own = Statistics.of(counts, 2, None)
        out += [_pack_table(row) for row in own.frequencies[:2]]
        out.append(own.entry_model(2).encode(columns, empty, empty))
    return b"".join(out)


def unpack_statistics(data: bytes, columns: int, vocab_size: int | None) -> Statistics:
    """The reverse; ``vocab_size``: of the classes, None if there are none. Raises ``ValueError`` for other bytes."""
    rows, at = [], 0
    for _ in range(columns + RANK_CONTEXTS + VALUE_CONTEXTS):
        row, at = _unpack_table(data, at)
        rows.append(row)
    frequencies = np.stack(rows)
    if vocab_size is None:
        if at != len(data):
            raise ValueError(f"a model has {len(data) - at} bytes too many")
        return Statistics(frequencies, None)
    own = [np.zeros(256, np.uint16) for _ in range(2)]
    for i in range(2):
        own[i], at = _unpack_table(data, at)
    idle = np.zeros(256, np.uint16)
    idle[ESCAPE] = SLOTS
    model = EntryModel(2, np.stack([*own, *[idle] * (RANK_CONTEXTS + VALUE_CONTEXTS)]))
    unit = np.array([[at, len(data) - at, vocab_size]])
    decoded, _, _ = model.decode(np.frombuffer(data, np.uint8), unit, 0, 1)
    if int(decoded[:, 1].max(initial=0)) > UNSEEN:
        raise ValueError("a model has an id class that is too large")
    return Statistics(frequencies, decoded[:, 1].astype(np.uint8))


def _class_columns(classes: NDArray[np.uint8]) -> NDArray[np.int32]:
    return np.stack([np.zeros(len(classes), np.int32), classes.astype(np.int32)], 1)


def _pack_table(row: NDArray[np.uint16]) -> bytes:
    symbols = np.flatnonzero(row)
    table = np.empty(len(symbols), [("symbol", "u1"), ("slots", "<u2")])
    table["symbol"], table["slots"] = symbols, row[symbols]
    return bytes([len(symbols) % 256]) + table.tobytes()


def _unpack_table(data: bytes, at: int) -> tuple[NDArray[np.uint16], int]:
    count = (data[at] or 256) if at < len(data) else 256
    end = at + 1 + 3 * count
    if end > len(data):
        raise ValueError("a model is cut short")
    table = np.frombuffer(data[at + 1 : end], [("symbol", "u1"), ("slots", "<u2")])
    row = np.zeros(256, np.uint16)
    row[table["symbol"]] = table["slots"]
    return row, end
