"""``decode_blocks``: entry blocks (FORMAT.md, "coding blocks"), a warp each, a lane for each row of a group.

Which word a coder takes, and which raw bits belong to a row, depends on what all rows before it have taken. So a step
of all lanes guesses what each takes, adds the guesses up, decodes, and does so again until every lane has taken what
was guessed. The first lane is right at once, and each one right after those before it: that ends, whatever the bytes.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kdfast.kernels.packed_bits import (
    CUT_SHORT,
    LANES,
    LEFT_OVER,
    OUT_OF_BOUNDS,
    TOO_MANY,
    Decoded,
    Stream,
    floor_log2,
    peek,
)
from kdfast.kernels.variant import Variant

__all__ = ["VARIANTS", "decode_blocks", "slots"]

# As in csrc/codec.h.
PROB_BITS = tl.constexpr(12)
PROBS = tl.constexpr(1 << 12)
LOWEST = tl.constexpr(1 << 16)
ESCAPE = tl.constexpr(255)
REST_CLASSES = tl.constexpr(12)
RANK_CONTEXTS = tl.constexpr(24 * 12)
FIRST_ENTRY = tl.constexpr(23)
RANK_SYMBOLS = tl.constexpr(48)
UNIT_FIELDS = tl.constexpr(5)


@triton.jit
def next_symbol(tables, context, state):
    """A coder's next symbol, and its state, which may want a word."""
    slot = tl.load(tables + context * PROBS + (state & (PROBS - 1)).to(tl.int32))
    slot = slot.to(tl.uint32, bitcast=True)
    state = ((slot >> 20) + 1) * (state >> PROB_BITS) + (slot >> 8 & 4095)
    return (slot & 255).to(tl.int32), state


@triton.jit
def refill(stream, last, state, wants, bit):
    word = (peek(stream, last, bit) & 65535).to(tl.uint32)
    return tl.where(wants, state << 16 | word, state)


@triton.jit
def finish_number(symbol, window):
    """The number that begins with a symbol, and how many raw bits it takes."""
    escaped = symbol == ESCAPE
    symbol = tl.where(escaped, window & 255, symbol)
    skip = tl.where(escaped, 8, 0)
    bits = tl.maximum((symbol >> 4) - 1, 0)
    low = (window >> skip) & ((1 << bits) - 1)
    return tl.where(bits > 0, (((symbol & 15) | 16) << bits) + low, symbol), skip + bits


@triton.jit
def rest_class(left):
    beyond = tl.maximum(left - 3, 1)
    return tl.where(left <= 4, tl.maximum(left - 1, 0), tl.minimum(floor_log2(beyond) + 3, REST_CLASSES - 1))


@triton.jit
def finish_rank(symbol, lowest, window):
    """The rank that begins with a symbol, not below `lowest`: (rank, octave, raw bits taken, whether there is one)."""
    escaped = symbol == ESCAPE
    symbol = tl.where(escaped, window & 255, symbol)
    skip = tl.where(escaped, 8, 0)
    bits = tl.minimum(tl.maximum((symbol >> 1) - 1, 0), 22)
    first = tl.where(bits > 0, ((symbol & 1) | 2) << bits, symbol)
    end = tl.where(symbol < RANK_SYMBOLS, first + (1 << bits), 0)
    lowest = tl.maximum(first, lowest)
    ascends = lowest < end
    # In truncated binary, among the ranks that may follow.
    among = tl.where(ascends, end - lowest, 1)
    whole = floor_log2(among)
    shorts = (2 << whole) - among
    low = (window >> skip) & ((1 << whole) - 1)
    longer = (low >= shorts).to(tl.int32)
    high = longer & (window >> (skip + whole))
    octave = tl.minimum(tl.where(symbol < 2, symbol, symbol // 2 + 1), FIRST_ENTRY - 1)
    return lowest + low + high * ((1 << whole) - shorts), octave, skip + whole + longer, ascends


@triton.jit
def _decode_blocks(
    stream,
    last,
    units,
    tables,
    columns,
    places,
    ranks,
    values,
    status,
    total,
    max_entries,
    max_rank,
    value_limit,
    COLUMNS: tl.constexpr,
    BY_TOTAL: tl.constexpr,
):
    unit = tl.program_id(0)
    lane = tl.arange(0, LANES)
    units += unit * UNIT_FIELDS
    begin, length, rows = tl.load(units), tl.load(units + 1), tl.load(units + 2)
    first_row, first_group = tl.load(units + 3), tl.load(units + 4)
    coders = tl.minimum(rows, LANES)
    head = 4 + 4 * coders
    count = (peek(stream, last, begin * 8) & 0xFFFFFFFF).to(tl.int64)
    fault = tl.where((length < head) | (count > (length - head) // 2), CUT_SHORT, 0)
    state = (peek(stream, last, (begin + 4 + 4 * lane) * 8) & 0xFFFFFFFF).to(tl.uint32)
    state = tl.where(lane < coders, state, LOWEST)
    # Bit positions in the stream: of the next word and the next raw bit, and where they end.
    word = (begin + head) * 8
    raw = word + count * 16
    words_end, end = raw, (begin + length) * 8
    row = tl.full([], 0, tl.int64)
    while (row < rows) & (fault == 0):
        inside = lane < rows - row
        left = tl.where(inside, total, 0)
        for c in tl.static_range(1 if BY_TOTAL else 0, COLUMNS):
            symbol, state_then = next_symbol(tables, tl.zeros_like(lane) + c, state)
            state = tl.where(inside, state_then, state)
            wants = inside & (state < LOWEST)
            taken = wants.to(tl.int32) * 16
            state = refill(stream, last, state, wants, word + tl.cumsum(taken, 0) - taken)
            word += tl.sum(taken, 0)
            number = tl.zeros_like(lane)
            taken = tl.where(inside, tl.where(symbol == ESCAPE, 8, tl.maximum((symbol >> 4) - 1, 0)), 0)
            wrong = 1
            while wrong > 0:
                window = (peek(stream, last, raw + tl.cumsum(taken, 0) - taken) & 0x7FFFFFFF).to(tl.int32)
                number, took = finish_number(symbol, window)
                took = tl.where(inside, took, 0)
                wrong = tl.max((took != taken).to(tl.int32), 0)
                taken = took
            raw += tl.sum(taken, 0)
            if c == 0:
                left = tl.where(inside, number, 0)
            tl.store(columns + (first_row + row + lane) * COLUMNS + c, number, mask=inside)
        fault = tl.where((word > words_end) | (raw > end), CUT_SHORT, fault)
        at = (first_group + row // LANES) * max_entries * LANES + lane
        octave = tl.zeros_like(lane) + FIRST_ENTRY
        lowest, entries = tl.zeros_like(lane), tl.zeros_like(lane)
        t = 0
        while (tl.max(left, 0) > 0) & (t < max_entries) & (fault == 0):
            active = left > 0
            rest = rest_class(left)
            symbol, state_then = next_symbol(tables, COLUMNS + octave * REST_CLASSES + rest, state)
            wants = active & (state_then < LOWEST)
            rank, value, ascends = lowest, lowest, active
            state_after, octave_then = state_then, octave
            # What a lane takes: its words in the upper half, its raw bits in the lower one. At first, the least.
            _, _, least, _ = finish_rank(symbol, lowest, lane * 0)
            taken = tl.where(active, (wants.to(tl.int32) << 16) + least, 0)
            wrong = 1
            while wrong > 0:
                before = tl.cumsum(taken, 0) - taken
                own_word, own_raw = word + (before >> 16) * 16, raw + (before & 65535)
                state_after = refill(stream, last, state_then, wants, own_word)
                window = (peek(stream, last, own_raw) & 0x7FFFFFFF).to(tl.int32)
                rank, octave_then, rank_bits, ascends = finish_rank(symbol, lowest, window)
                context = COLUMNS + RANK_CONTEXTS + octave_then * REST_CLASSES + rest
                value_symbol, state_after = next_symbol(tables, context, state_after)
                wants_more = active & (state_after < LOWEST)
                own_word += tl.where(wants, 16, 0)
                state_after = refill(stream, last, state_after, wants_more, own_word)
                window = (peek(stream, last, own_raw + rank_bits) & 0x7FFFFFFF).to(tl.int32)
                value, value_bits = finish_number(value_symbol, window)
                took = ((wants.to(tl.int32) + wants_more.to(tl.int32)) << 16) + rank_bits + value_bits
                took = tl.where(active, took, 0)
                wrong = tl.max((took != taken).to(tl.int32), 0)
                taken = took
            state = tl.where(active, state_after, state)
            word += (tl.sum(taken, 0) >> 16) * 16
            raw += tl.sum(taken, 0) & 65535
            spent = value + 1 if BY_TOTAL else tl.zeros_like(lane) + 1
            good = ascends & (rank < max_rank) & (value < value_limit) & (spent <= left)
            fault = tl.where(tl.max((active & (good == 0)).to(tl.int32), 0) > 0, OUT_OF_BOUNDS, fault)
            fault = tl.where((word > words_end) | (raw > end), CUT_SHORT, fault)
            tl.store(ranks + at + t * LANES, rank, mask=active & good)
            tl.store(values + at + t * LANES, value, mask=active & good)
            octave, lowest = octave_then, rank + 1
            entries += active.to(tl.int32)
            left = tl.where(active, left - spent, 0)
            t += 1
        fault = tl.where((fault == 0) & (tl.max(left, 0) > 0), TOO_MANY, fault)
        tl.store(columns + (first_row + row + lane) * COLUMNS, entries, mask=inside)
        tl.store(places + first_row + row + lane, at, mask=inside)
        row += LANES
    ended = (word == words_end) & (end - raw < 8) & (tl.max((state != LOWEST).to(tl.int32), 0) == 0)
    tl.store(status + unit, tl.where((fault == 0) & (ended == 0), LEFT_OVER, fault))


def slots(frequencies: NDArray[np.uint16]) -> NDArray[np.int32]:
    """(contexts, 4096): for each slot its symbol (8 bits), how far it is from the symbol's first slot (12), and how
    many slots the symbol has, less 1 (12). One look-up is all that a coder waits for.

    ``frequencies``: (contexts, 256), each summing to 4096.
    """
    flat = frequencies.astype(np.int64).ravel()
    symbol = np.repeat(np.arange(flat.size), flat)
    first = flat.cumsum() - flat
    packed = (symbol & 255) | (np.arange(symbol.size) - first[symbol]) << 8 | (flat[symbol] - 1) << 20
    return packed.astype(np.uint32).view(np.int32).reshape(len(frequencies), PROBS.value)


def decode_blocks(
    data: Tensor,
    units: NDArray[np.int64],
    tables: Tensor,
    columns: int,
    total: int,
    max_entries: int,
    max_rank: int,
    value_limit: int,
) -> Decoded:
    """The rows of some blocks.

    Args:
        data: (bytes,) uint8, holding the units.
        units: (units, 3): each one's first byte, its length in bytes, its rows: all within ``data``.
        tables: what ``slots`` makes, on the device of ``data``.
        columns: of a row.
        total: what a row's values, each plus 1, add up to; 0: that varies.
    """
    rows = units[:, 2]
    groups = -(-rows // LANES.value)
    fields = np.concatenate([units, (rows.cumsum() - rows)[:, None], (groups.cumsum() - groups)[:, None]], 1)
    out = Decoded.room(int(rows.sum()), int(groups.sum()), len(units), columns, max_entries, data.device)
    stream, table = Stream(data), torch.from_numpy(fields).to(data.device)
    if len(units):
        _decode_blocks[(len(units),)](
            stream.words,
            stream.last,
            table,
            tables,
            out.columns,
            out.places,
            out.ranks,
            out.values,
            out.status,
            total,
            max_entries,
            max_rank,
            value_limit,
            COLUMNS=columns,
            BY_TOTAL=total > 0,
            num_warps=1,
        )
    return out


VARIANTS = [
    Variant(
        f"columns={columns}{' by total' if by_total else ''}",
        _decode_blocks,
        {
            "stream": "*i32",
            "last": "i32",
            "units": "*i64",
            "tables": "*i32",
            "columns": "*i32",
            "places": "*i64",
            "ranks": "*i32",
            "values": "*i32",
            "status": "*i32",
            "total": "i32",
            "max_entries": "i32",
            "max_rank": "i32",
            "value_limit": "i32",
        },
        {"COLUMNS": columns, "BY_TOTAL": by_total},
        warps=1,
        gathers=True,
    )
    for columns, by_total in ((1, False), (1, True), (2, False), (2, True), (3, False))
]
