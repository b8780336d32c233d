"""``decode_blocks``: entry blocks (FORMAT.md, "coding blocks"), a warp each, a lane for each row of a group.

All lanes read one stream of words and one of raw bits, so where a lane's begin depends on what the lanes before it
take. Each step is a fixed-point iteration: guess each lane's bit count, prefix-sum, decode, repeat until the counts
agree. Lane i is right after i + 1 rounds, so it terminates on any input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    Limits,
    Stream,
    floor_log2,
    peek,
    take,
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


class _Coder(NamedTuple):
    """How far a block is decoded."""

    state: tl.tensor  # (LANES,) of the entropy coders
    word: tl.tensor  # bit position of the next 16-bit word
    raw: tl.tensor  # bit position of the next raw bit


class _Block(NamedTuple):
    """Where a block lies, and its rows."""

    rows: tl.tensor
    first_row: tl.tensor
    first_group: tl.tensor
    words_end: tl.tensor  # bit positions
    end: tl.tensor


# ---- symbols ---------------------------------------------------------------------------------------------------------


@triton.jit
def next_symbol(tables, context, state):
    """A coder's next symbol, and its state, which may want a word."""
    slot = tl.load(tables + context * PROBS + (state & (PROBS - 1)).to(tl.int32))
    slot = slot.to(tl.uint32, bitcast=True)
    state = ((slot >> 20) + 1) * (state >> PROB_BITS) + (slot >> 8 & 4095)
    return (slot & 255).to(tl.int32), state


@triton.jit
def refill(packed, state, wants, bit):
    """The states, with a word more in those that want one."""
    word = (peek(packed, bit) & 65535).to(tl.uint32)
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
    """The class of how much of a row is left, which a context depends on."""
    beyond = tl.maximum(left - 3, 1)
    return tl.where(left <= 4, tl.maximum(left - 1, 0), tl.minimum(floor_log2(beyond) + 3, REST_CLASSES - 1))


@triton.jit
def finish_rank(symbol, lowest, window):
    """(rank, octave, raw bits taken, whether there is one) of the rank >= ``lowest`` that begins with a symbol."""
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


# ---- steps of all lanes ----------------------------------------------------------------------------------------------


@triton.jit
def _open_block(packed, units, unit):
    """(_Block, _Coder, fault)."""
    lane = tl.arange(0, LANES)
    units += unit * UNIT_FIELDS
    begin, length, rows = tl.load(units), tl.load(units + 1), tl.load(units + 2)
    first_row, first_group = tl.load(units + 3), tl.load(units + 4)
    coders = tl.minimum(rows, LANES)
    head = 4 + 4 * coders
    count = (peek(packed, begin * 8) & 0xFFFFFFFF).to(tl.int64)
    fault = tl.where((length < head) | (count > (length - head) // 2), CUT_SHORT, 0)
    state = (peek(packed, (begin + 4 + 4 * lane) * 8) & 0xFFFFFFFF).to(tl.uint32)
    state = tl.where(lane < coders, state, LOWEST)
    word = (begin + head) * 8
    raw = word + count * 16
    return _Block(rows, first_row, first_group, raw, (begin + length) * 8), _Coder(state, word, raw), fault


@triton.jit
def _number(packed, tables, context, coder, inside):
    """(_Coder, the next number of every lane inside)."""
    lane = tl.arange(0, LANES)
    symbol, state_then = next_symbol(tables, tl.zeros_like(lane) + context, coder.state)
    state = tl.where(inside, state_then, coder.state)
    wants = inside & (state < LOWEST)
    taken = wants.to(tl.int32) * 16
    state = refill(packed, state, wants, coder.word + tl.cumsum(taken, 0) - taken)
    word = coder.word + tl.sum(taken, 0)
    number = tl.zeros_like(lane)
    taken = tl.where(inside, tl.where(symbol == ESCAPE, 8, tl.maximum((symbol >> 4) - 1, 0)), 0)
    wrong = 1
    while wrong > 0:
        window = take(packed, coder.raw + tl.cumsum(taken, 0) - taken)
        number, took = finish_number(symbol, window)
        took = tl.where(inside, took, 0)
        wrong = tl.max((took != taken).to(tl.int32), 0)
        taken = took
    return _Coder(state, word, coder.raw + tl.sum(taken, 0)), number


@triton.jit
def _entry(packed, tables, coder, active, left, octave, lowest, COLUMNS: tl.constexpr):
    """(_Coder, rank, value, octave, whether ranks ascend): the next entry of every active lane."""
    lane = tl.arange(0, LANES)
    rest = rest_class(left)
    symbol, state_then = next_symbol(tables, COLUMNS + octave * REST_CLASSES + rest, coder.state)
    wants = active & (state_then < LOWEST)
    rank, value, ascends = lowest, lowest, active
    state_after, octave_then = state_then, octave
    # What a lane takes: its words in the upper half, its raw bits in the lower one. At first, the least.
    _, _, least, _ = finish_rank(symbol, lowest, lane * 0)
    taken = tl.where(active, (wants.to(tl.int32) << 16) + least, 0)
    wrong = 1
    while wrong > 0:
        before = tl.cumsum(taken, 0) - taken
        own_word, own_raw = coder.word + (before >> 16) * 16, coder.raw + (before & 65535)
        state_after = refill(packed, state_then, wants, own_word)
        rank, octave_then, rank_bits, ascends = finish_rank(symbol, lowest, take(packed, own_raw))
        context = COLUMNS + RANK_CONTEXTS + octave_then * REST_CLASSES + rest
        value_symbol, state_after = next_symbol(tables, context, state_after)
        wants_more = active & (state_after < LOWEST)
        own_word += tl.where(wants, 16, 0)
        state_after = refill(packed, state_after, wants_more, own_word)
        value, value_bits = finish_number(value_symbol, take(packed, own_raw + rank_bits))
        took = ((wants.to(tl.int32) + wants_more.to(tl.int32)) << 16) + rank_bits + value_bits
        took = tl.where(active, took, 0)
        wrong = tl.max((took != taken).to(tl.int32), 0)
        taken = took
    total = tl.sum(taken, 0)
    state = tl.where(active, state_after, coder.state)
    after = _Coder(state, coder.word + (total >> 16) * 16, coder.raw + (total & 65535))
    return after, rank, value, octave_then, ascends


# ---- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _entries(packed, tables, coder, block, left, at, fault, out, limits, COLUMNS: tl.constexpr, BY_TOTAL: tl.constexpr):
    """(_Coder, how many entries each lane has, fault): the entries of a group's rows, which are written."""
    lane = tl.arange(0, LANES)
    octave = tl.zeros_like(lane) + FIRST_ENTRY
    lowest, entries = tl.zeros_like(lane), tl.zeros_like(lane)
    t = 0
    while (tl.max(left, 0) > 0) & (t < limits.max_entries) & (fault == 0):
        active = left > 0
        coder, rank, value, octave, ascends = _entry(packed, tables, coder, active, left, octave, lowest, COLUMNS)
        spent = value + 1 if BY_TOTAL else tl.zeros_like(lane) + 1
        good = ascends & (rank < limits.max_rank) & (value < limits.value_limit) & (spent <= left)
        fault = tl.where(tl.max((active & (good == 0)).to(tl.int32), 0) > 0, OUT_OF_BOUNDS, fault)
        fault = tl.where((coder.word > block.words_end) | (coder.raw > block.end), CUT_SHORT, fault)
        tl.store(out.ranks + at + t * LANES, rank, mask=active & good)
        tl.store(out.entry_values + at + t * LANES, value, mask=active & good)
        lowest = rank + 1
        entries += active.to(tl.int32)
        left = tl.where(active, left - spent, 0)
        t += 1
    fault = tl.where((fault == 0) & (tl.max(left, 0) > 0), TOO_MANY, fault)
    return coder, entries, fault


@triton.jit
def _decode_blocks(packed, units, tables, out, total, limits, COLUMNS: tl.constexpr, BY_TOTAL: tl.constexpr):
    unit = tl.program_id(0)
    lane = tl.arange(0, LANES)
    block, coder, fault = _open_block(packed, units, unit)
    row = tl.full([], 0, tl.int64)
    while (row < block.rows) & (fault == 0):
        inside = lane < block.rows - row
        left = tl.where(inside, total, 0)
        for c in tl.static_range(1 if BY_TOTAL else 0, COLUMNS):
            coder, number = _number(packed, tables, c, coder, inside)
            if c == 0:
                left = tl.where(inside, number, 0)
            tl.store(out.columns + (block.first_row + row + lane) * COLUMNS + c, number, mask=inside)
        fault = tl.where((coder.word > block.words_end) | (coder.raw > block.end), CUT_SHORT, fault)
        at = (block.first_group + row // LANES) * limits.max_entries * LANES + lane
        coder, entries, fault = _entries(packed, tables, coder, block, left, at, fault, out, limits, COLUMNS, BY_TOTAL)
        tl.store(out.columns + (block.first_row + row + lane) * COLUMNS, entries, mask=inside)
        tl.store(out.places + block.first_row + row + lane, at, mask=inside)
        row += LANES
    # The bits that are left of the last byte are zeros.
    spare = tl.maximum(tl.minimum(block.end - coder.raw, 8), 0).to(tl.int32)
    ended = (coder.word == block.words_end) & (block.end - coder.raw < 8)
    ended = ended & ((take(packed, coder.raw) & ((1 << spare) - 1)) == 0)
    ended = ended & (tl.max((coder.state != LOWEST).to(tl.int32), 0) == 0)
    tl.store(out.status + unit, tl.where((fault == 0) & (ended == 0), LEFT_OVER, fault))


# ---- launch ----------------------------------------------------------------------------------------------------------


def slots(frequencies: NDArray[np.uint16]) -> NDArray[np.int32]:
    """The look-up tables of a model, one look-up for each symbol that a coder decodes.

    Args:
        frequencies: (contexts, 256), each summing to 4096.

    Returns:
        (contexts, 4096): for each slot its symbol (8 bits), how far it is from the symbol's first slot (12), and how
        many slots the symbol has, less 1 (12).
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
    """The rows of some entry blocks.

    Args:
        data: (bytes,) uint8, holding the units.
        units: (units, 3): each one's first byte, its length in bytes, its rows: all within ``data``.
        tables: what ``slots`` makes, on the device of ``data``.
        columns: of a row.
        total: what a row's values, each plus 1, add up to; 0: that varies.
        max_entries: of a row.
        max_rank: ranks are below it.
        value_limit: values are below it.

    Returns:
        The rows of all units, in order. Bytes that are no block are no error here: ``Decoded.status`` says so.
    """
    rows = units[:, 2]
    groups = -(-rows // LANES.value)
    fields = np.concatenate([units, (rows.cumsum() - rows)[:, None], (groups.cumsum() - groups)[:, None]], 1)
    out = Decoded.room(int(rows.sum()), int(groups.sum()), len(units), columns, max_entries, data.device)
    packed, table = Stream.of(data), torch.from_numpy(fields).to(data.device)
    if len(units):
        arguments = _arguments(packed, table, tables, out, total, Limits(max_entries, max_rank, value_limit))
        _decode_blocks[(len(units),)](**arguments)
    return out


def _arguments(
    packed: Stream, units: Tensor, tables: Tensor, out: Decoded, total: int, limits: Limits
) -> dict[str, Any]:
    given = {"packed": packed, "units": units, "tables": tables, "out": out, "total": total, "limits": limits}
    return {**given, "COLUMNS": out.columns.shape[1], "BY_TOTAL": total > 0, "num_warps": 1}


def _variant(columns: int, by_total: bool) -> Variant:
    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    out = Decoded.room(33, 2, 1, columns, 50, torch.device("meta"))
    call = _arguments(
        Stream(meta(99), 97), meta(1, 5, dtype=torch.int64), meta(9, 4096), out, 13 * by_total, Limits(50, 50257, 99)
    )
    return Variant(f"columns={columns}{' by total' if by_total else ''}", _decode_blocks, call, gathers=True)


VARIANTS = [_variant(*form) for form in ((1, False), (1, True), (2, False), (2, True), (3, False))]
