"""Units of entry codecs decoded where they lie: bits by Triton kernels, what they stand for by PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._triton import kernel
from kdfast.labels.soft_labels import SoftLabels, table_on

if TYPE_CHECKING:
    from kdfast.cache.codecs.entries import EntryCodec

__all__ = ["decode"]

# Every row has room for as many entries as it may have, until all are decoded: 8 bytes each.
MOST_SLOTS = 2**27

FAULTS = {
    1: "is cut short",
    2: "does not end where it should",
    3: "holds a row with too many entries",
    4: "holds ranks that do not ascend or lie outside the vocabulary, or values beyond their limit",
}


def decode(codec: EntryCodec, data: Tensor, units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels | None:
    """What ``codec.decode`` gives, on the device of ``data``; None if that is to be asked instead.

    Raises:
        ValueError: the bytes are not what ``encode`` writes.
    """
    run = kernel("decode_blocks" if codec.coding == "blocks" else "decode_rows")
    padded = units[:, 2] + 31 if codec.coding == "blocks" else np.array([len(units) + 31])
    if run is None or int(padded.sum()) * codec.max_entries > MOST_SLOTS:
        return None
    _check_units(codec, units, data.numel())
    if len(wanted) and not 0 <= wanted.min() <= wanted.max() < units[:, 2].sum():
        raise IndexError(f"wanted rows {wanted.min()} to {wanted.max()} are out of range")
    limits = (codec.max_entries, codec.vocab_size, codec.value_limit)
    if codec.coding == "blocks":
        slots = table_on(codec.slots, data.device)
        decoded = run(data, units, slots, codec.columns, codec.total, *limits)
    else:
        decoded = run(data, units, *codec.field_widths, codec.coding == "rows", *limits)
    return _Entries(codec, decoded, wanted).labels()


def _check_units(codec: EntryCodec, units: NDArray[np.int64], size: int) -> None:
    begin, length, rows = units.T
    if (units < 0).any() or (begin > size - length).any() or (rows >= 2**31).any():
        raise ValueError("a unit lies outside the data")
    if codec.coding != "blocks" and (rows != 1).any():
        raise ValueError("a unit of a row block is one row")


class _Entries:
    """What a kernel has decoded, cut down to the rows that are wanted."""

    def __init__(self, codec: EntryCodec, decoded: Any, wanted: NDArray[np.int64]) -> None:
        self.codec, self.decoded = codec, decoded
        self.device = decoded.columns.device
        every = np.array_equal(wanted, np.arange(len(decoded.columns)))
        rows = None if every else torch.from_numpy(wanted).to(self.device)
        self.columns = decoded.columns if rows is None else decoded.columns[rows]
        self.places = decoded.places if rows is None else decoded.places[rows]

    def labels(self) -> SoftLabels:
        total = self._require_sound()
        counts = self.columns[:, 0].long()
        row = torch.repeat_interleave(counts, output_size=total)
        turn = torch.arange(total, device=self.device) - (counts.cumsum(0) - counts)[row]
        at = self.places[row] + 32 * turn
        ids = self._ids(self.decoded.ranks[at], row)
        values = self.decoded.entry_values[at]
        if self.codec.levels is not None:
            values = table_on(self.codec.level_table, self.device)[values.long()]
        return self.codec.to_labels(self.columns, ids, values)

    def _require_sound(self) -> int:
        """How many entries are wanted, once nothing is known to be wrong: the one time that the host waits."""
        limits = torch.tensor(self.codec.column_limits, dtype=torch.int32).to(self.device)
        beyond = (self.decoded.columns >= limits).any()
        fault = self.decoded.status.max() if len(self.decoded.status) else beyond
        total, fault, beyond = torch.stack([self.columns[:, 0].sum(), fault.long(), beyond.long()]).tolist()
        if fault:
            raise ValueError(f"{'an entry' if self.codec.coding == 'blocks' else 'a row'} block {FAULTS[fault]}")
        if beyond:
            raise ValueError("a column exceeds its limit")
        return int(total)

    def _ids(self, ranks: Tensor, row: Tensor) -> Tensor:
        order = table_on(self.codec.order_table, self.device)
        at = ranks.long()
        if len(order) > 1:
            at += self.columns[:, 1].long()[row] * order.shape[1]
        return order.view(-1)[at]
