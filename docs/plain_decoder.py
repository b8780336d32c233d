"""Entry and row blocks in NumPy and plain Python: FORMAT.md's codecs in executable form. Slow, and needs no extension.

    rows = decode_entry_block(block, count, tables, header_fields=2, total=50)

``tables`` are the frequencies that ``read_tables`` finds in a shard's ``codec_model``. Bytes that no writer makes are
a ``ValueError`` or an ``IndexError``; that ranks, fields and values lie below their limits is the caller's to check.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["DecodedRows", "decode_entry_block", "decode_row", "read_tables"]

LANES = 32
ESCAPE = 255
LOWEST = 2**16
REST_CLASSES, RANK_CONTEXTS = 12, 24 * 12
FIRST_ENTRY = 23
CLASS_BITS, CLASS_START = (5, 9, 13), (0, 32, 544, 8736)


@dataclass
class DecodedRows:
    """Decoded rows: per row its header fields, and its entries as (rank, value)."""

    headers: list[list[int]] = field(default_factory=list)
    entries: list[list[tuple[int, int]]] = field(default_factory=list)


# ---- entry blocks ---------------------------------------------------------------------------------------------------


def read_tables(model: bytes, contexts: int) -> tuple[NDArray[np.uint16], int]:
    """(contexts, 256) frequencies at the start of a model, and where they end."""
    count, at = int.from_bytes(model[:2], "little"), 2
    tables = np.zeros((count, 256), np.uint16)
    for table in tables:
        symbols, at = model[at] + 1, at + 1
        for _ in range(symbols):
            table[model[at]] = int.from_bytes(model[at + 1 : at + 3], "little")
            at += 3
    which = np.frombuffer(model, "<u2", contexts, at)
    return tables[which], at + 2 * contexts


class _Coder:
    """32 coders that share one sequence of words, and the raw bits."""

    def __init__(self, block: bytes, lanes: int, tables: NDArray[np.uint16]) -> None:
        words = int.from_bytes(block[:4], "little")
        head = 4 + 4 * lanes
        _require(head + 2 * words <= len(block), "a block is cut short")
        self.states = [int(x) for x in np.frombuffer(block, "<u4", lanes, 4)]
        self.words = iter(np.frombuffer(block, "<u2", words, head).tolist())
        self.raw, self.left = int.from_bytes(block[head + 2 * words :], "little"), 8 * (len(block) - head - 2 * words)
        self.tables, self.starts = tables, np.cumsum(tables, axis=1, dtype=np.int64) - tables

    def symbol(self, lane: int, context: int) -> int:
        x = self.states[lane]
        slot = x % 4096
        symbol = int(np.searchsorted(self.starts[context] + self.tables[context], slot, side="right"))
        x = int(self.tables[context, symbol]) * (x // 4096) + slot - int(self.starts[context, symbol])
        self.states[lane] = x if x >= LOWEST else x * 65536 + self.word()
        return self.bits(8) if symbol == ESCAPE else symbol

    def word(self) -> int:
        word = next(self.words, None)
        _require(word is not None, "a block is cut short")
        return word or 0

    def bits(self, n: int) -> int:
        self.left -= n
        _require(self.left >= 0, "a block is cut short")
        value = self.raw & ((1 << n) - 1)
        self.raw >>= n
        return value

    def below(self, limit: int) -> int:
        """Read a number below ``limit`` in truncated binary: n bits, and one more unless they are a short code."""
        n = limit.bit_length() - 1
        short = 2 ** (n + 1) - limit
        low = self.bits(n)
        return low if low < short else low + self.bits(1) * (2**n - short)

    def finish(self) -> None:
        """Nothing is left but the zeros that fill the last byte up."""
        ended = next(self.words, None) is None and set(self.states) <= {LOWEST}
        _require(ended and self.left < 8 and not self.raw, "a block does not end where it should")

    def number(self, lane: int, context: int) -> int:
        symbol = self.symbol(lane, context)
        n = _low_bits(symbol, 4)
        return _join(symbol, n, self.bits(n), 4)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _low_bits(symbol: int, mantissa: int) -> int:
    return max(0, (symbol >> mantissa) - 1)


def _join(symbol: int, n: int, low: int, mantissa: int) -> int:
    return ((2**mantissa + symbol % 2**mantissa) << n) + low if n else symbol


def _octave(symbol: int) -> int:
    return min(symbol if symbol < 2 else symbol // 2 + 1, FIRST_ENTRY - 1)


def _rest_class(left: int) -> int:
    return left - 1 if left <= 4 else min((left - 3).bit_length() + 2, REST_CLASSES - 1)


def decode_entry_block(
    block: bytes, rows: int, tables: NDArray[np.uint16], *, header_fields: int, total: int = 0
) -> DecodedRows:
    """Decode a block of ``rows`` rows. ``total``: what a row's values, each plus 1, add up to; 0: that varies."""
    coder, out = _Coder(block, min(LANES, rows), tables), DecodedRows()
    for first in range(0, rows, LANES):
        lanes = range(min(LANES, rows - first))
        numbers = [[0] * header_fields for _ in lanes]
        for c in range(1 if total else 0, header_fields):
            for lane in lanes:
                numbers[lane][c] = coder.number(lane, c)
        entries = _entries(coder, header_fields, [total or row[0] for row in numbers], bool(total))
        for row, own in zip(numbers, entries, strict=True):
            row[0] = len(own)
        out.headers += numbers
        out.entries += entries
    coder.finish()
    return out


def _entries(coder: _Coder, header_fields: int, left: list[int], by_total: bool) -> list[list[tuple[int, int]]]:
    """A group's entries, which come in turns: the first of each row, the second of each row that has one, ..."""
    entries: list[list[tuple[int, int]]] = [[] for _ in left]
    before = [FIRST_ENTRY] * len(left)
    last = [(0, 0)] * len(left)  # the last rank's symbol, and the low bits that may follow in it
    while any(left):
        for lane in (lane for lane, rest in enumerate(left) if rest):
            rest = _rest_class(left[lane])
            symbol = coder.symbol(lane, header_fields + before[lane] * REST_CLASSES + rest)
            n = _low_bits(symbol, 1)
            passed = last[lane][1] if symbol == last[lane][0] else 0
            _require(last[lane][0] <= symbol < 48 and passed < 2**n, "ranks do not ascend")
            low = passed + coder.below(2**n - passed)
            before[lane], last[lane] = _octave(symbol), (symbol, low + 1)
            value = coder.number(lane, header_fields + RANK_CONTEXTS + before[lane] * REST_CLASSES + rest)
            entries[lane].append((_join(symbol, n, low, 1), value))
            left[lane] -= value + 1 if by_total else 1
            _require(left[lane] >= 0, "values go beyond their total")
    return entries


# ---- row blocks -----------------------------------------------------------------------------------------------------


def decode_row(
    block: bytes,
    rows: int,
    row: int,
    *,
    header_bits: list[int],
    value_bits: int,
    rank_bits: int,
    classes: bool,
    total: int = 0,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Decode one row of a row block: its header fields, and its entries as (rank, value)."""
    width = block[0]
    _require(width in (2, 4), "a block has no index")
    ends = [int.from_bytes(block[1 + width * i : 1 + width * (i + 1)], "little") for i in range(rows)]
    head = 1 + width * rows
    _require(ends == sorted(ends) and head + ends[-1] == len(block), "rows do not follow one another to the end")
    _require((ends[-1] < 2**16) == (width == 2), "an index of another width than its length asks for")
    begin = ends[row - 1] if row else 0
    raw, left = int.from_bytes(block[head + begin : head + ends[row]], "little"), 8 * (ends[row] - begin)

    def take(bits: int) -> int:
        nonlocal raw, left
        left -= bits
        _require(left >= 0, "a row is cut short")
        value, raw = raw & ((1 << bits) - 1), raw >> bits
        return value

    header = [take(bits) for bits in header_bits]
    entries = []
    for _ in range(header[0]):
        kind = take(2) if classes else 0
        bits = CLASS_BITS[kind] if classes and kind < len(CLASS_BITS) else rank_bits
        entries.append((take(bits) + (CLASS_START[kind] if classes else 0), take(value_bits)))
    ranks = [rank for rank, _ in entries]
    _require(ranks == sorted(set(ranks)), "ranks do not ascend")
    _require(not total or sum(value + 1 for _, value in entries) == total, "values do not add up to their total")
    _require(left < 8 and not raw, "a row is not filled up with zeros, or goes on")
    return header, entries
