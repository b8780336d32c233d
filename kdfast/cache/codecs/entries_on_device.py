"""Decoding units of entry codecs on the device where they lie: bits by Triton kernels, labels by PyTorch."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._triton import kernel
from kdfast.labels import SoftLabels
from kdfast.labels.ragged import table_on

__all__ = ["EntryDecoder", "decode"]

# Every row has room for as many entries as it may have, until all are decoded: 8 bytes each. How many that is the file
# says: so it gets no more than in proportion to the bytes that are there.
MOST_SLOTS, FREE_SLOTS, SLOTS_PER_BYTE = 2**27, 2**22, 32

FAULTS = {
    1: "is cut short",
    2: "does not end where it should",
    3: "holds a row with too many entries",
    4: "holds ranks that do not ascend or lie outside the vocabulary, or values beyond their limit",
}


class EntryDecoder(Protocol):
    """The part of ``EntryCodec`` that decoding needs."""

    coding: str
    vocab_size: int
    max_entries: int
    total: int
    remainder: int

    @property
    def header_fields(self) -> int: ...
    @property
    def value_limit(self) -> int: ...
    @property
    def header_limits(self) -> tuple[int, ...]: ...
    @property
    def field_widths(self) -> tuple[list[int], int, int]: ...

    # Tables: what a decoder of blocks looks up, ids by rank, and the weights that values stand for, if they do.
    @property
    def slots(self) -> Tensor: ...
    @property
    def order_table(self) -> Tensor: ...
    @property
    def level_table(self) -> Tensor | None: ...

    def to_labels(self, headers: Tensor, ids: Tensor, values: Tensor) -> SoftLabels: ...


def decode(codec: EntryDecoder, data: Tensor, units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels | None:
    """``codec.decode`` on the device of ``data``. Returns None without Triton, or if there is no room for the result.

    Raises:
        ValueError: the bytes are not what ``encode`` writes.
    """
    run = kernel("decode_blocks" if codec.coding == "blocks" else "decode_rows")
    padded = units[:, 2] + 31 if codec.coding == "blocks" else np.array([len(units) + 31])
    room = min(MOST_SLOTS, FREE_SLOTS + SLOTS_PER_BYTE * data.numel())
    if run is None:
        return None
    _check_units(codec, units, data.numel())
    if int(padded.sum()) * codec.max_entries > room:
        return None
    if len(wanted) and not 0 <= wanted.min() <= wanted.max() < units[:, 2].sum():
        raise IndexError(f"wanted rows {wanted.min()} to {wanted.max()} are out of range")
    limits = (codec.max_entries, codec.vocab_size, codec.value_limit)
    if codec.coding == "blocks":
        slots = table_on(codec.slots, data.device)
        decoded = run(data, units, slots, codec.header_fields, codec.total, *limits)
    else:
        decoded = run(data, units, *codec.field_widths, codec.coding == "rows", codec.total, *limits)
    return _Entries(codec, decoded, wanted).labels()


def _check_units(codec: EntryDecoder, units: NDArray[np.int64], size: int) -> None:
    begin, length, rows = units.T
    if (units < 0).any() or (begin > size - length).any() or (rows >= 2**31).any():
        raise ValueError("a unit lies outside the data")
    if codec.coding != "blocks" and (rows != 1).any():
        raise ValueError("a unit of a row block is one row")


class _Entries:
    """The rows that are wanted of what a kernel has decoded."""

    def __init__(self, codec: EntryDecoder, decoded: Any, wanted: NDArray[np.int64]) -> None:
        self.codec, self.decoded = codec, decoded
        self.device = decoded.columns.device
        every = np.array_equal(wanted, np.arange(len(decoded.columns)))
        rows = None if every else torch.from_numpy(wanted).to(self.device)
        self.headers = decoded.columns if rows is None else decoded.columns[rows]
        self.places = decoded.places if rows is None else decoded.places[rows]

    def labels(self) -> SoftLabels:
        total = self._require_sound()
        counts = self.headers[:, 0].long()
        row = torch.repeat_interleave(counts, output_size=total)
        turn = torch.arange(total, device=self.device) - (counts.cumsum(0) - counts)[row]
        at = self.places[row] + 32 * turn
        ids = self._ids(self.decoded.ranks[at], row)
        values = self.decoded.entry_values[at]
        levels = self.codec.level_table
        if levels is not None:
            values = table_on(levels, self.device)[values.long()]
        return self.codec.to_labels(self.headers, ids, values)

    def _require_sound(self) -> int:
        """The number of wanted entries. Raises ``ValueError`` for corrupt units. Only here the host waits."""
        limits = torch.tensor(self.codec.header_limits, dtype=torch.int32).to(self.device)
        beyond = (self.decoded.columns >= limits).any()
        unsound = self._unsound()
        fault = self.decoded.status.max() if len(self.decoded.status) else beyond
        numbers = (self.headers[:, 0].sum(), fault, beyond, unsound)
        total, fault, beyond, unsound = torch.stack([number.long() for number in numbers]).tolist()
        if fault:
            raise ValueError(f"{'an entry' if self.codec.coding == 'blocks' else 'a row'} block {FAULTS[fault]}")
        if beyond:
            raise ValueError("a column exceeds its limit")
        if unsound:
            raise ValueError("a row's numbers do not go together")
        return int(total)

    def _unsound(self) -> Tensor:
        """Whether a row's last entry, or its last field if it has none, is not what ``remainder`` asks for.

        Of rows that a kernel has refused the numbers are anything: what is read lies within bounds.
        """
        counts, values = self.headers[:, 0].long(), self.decoded.entry_values
        if self.codec.remainder < 0:
            return counts.new_zeros((), dtype=torch.bool)
        odd = self.headers[:, -1] - self.codec.remainder
        if len(values):
            at = self.places + 32 * (counts - 1)
            odd = torch.where(counts > 0, values[at.clamp(0, len(values) - 1)], odd)
        return (odd != 0).any()

    def _ids(self, ranks: Tensor, row: Tensor) -> Tensor:
        order = table_on(self.codec.order_table, self.device)
        at = ranks.long()
        if len(order) > 1:
            at += self.headers[:, 1].long()[row] * order.shape[1]
        return order.view(-1)[at]
