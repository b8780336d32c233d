"""Whether labels that another tool has made are such as a codec of entries gives back unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kdfast._C import count_symbols
from kdfast.labels import SoftLabels
from kdfast.labels.ragged import same_table

if TYPE_CHECKING:
    from kdfast.cache.codecs.entries import EntryCodec

__all__ = ["require_exact"]


def require_exact(codec: EntryCodec, labels: SoftLabels) -> None:
    """Raise ``ValueError`` unless ``codec`` holds ``labels``, of its own kind, on the CPU, to the last bit.

    It takes no model: that may not be learned yet.
    """
    assert labels.ids is not None
    assert labels.offsets is not None
    ids, counts = labels.ids.numpy(), np.diff(labels.offsets.numpy())
    _require_below("ids", ids, codec.vocab_size)
    _require_below("numbers of entries", counts, codec.max_entries + 1)
    if labels.prototype_ids is not None:
        assert codec.prototypes is not None
        _require_below("prototype", labels.prototype_ids.numpy(), len(codec.prototypes))
        if not same_table(labels.prototypes, codec.prototypes.table):
            raise ValueError(
                f"the labels refer to another table of prototypes than the codec's, {codec.prototypes.file_name}"
            )
    if not bool(labels.values.isfinite().all()):
        raise ValueError(f"{codec.name}: a value is not one that this codec gives: it is not finite")
    rows = codec.to_rows(labels, codec.orders)
    if (rows.columns < 0).any() or (rows.columns >= np.array(codec.column_limits)).any():
        raise ValueError(f"{codec.name}: a row is not one that this codec gives")
    count_symbols(rows.columns, rows.ranks, rows.values, codec.total)  # refuses a token twice and a wrong total
    which = np.repeat(rows.columns[:, 1], counts) if codec.prototypes is not None else np.zeros_like(rows.ranks)
    levels = rows.values if codec.levels is None else codec.levels[rows.values]
    numbers = (rows.columns, codec.orders.ids[which, rows.ranks], levels)
    back = codec.to_labels(*(torch.from_numpy(x) for x in numbers))
    assert back.ids is not None
    ours, theirs = _by_id(ids, counts), _by_id(back.ids.numpy(), counts)
    if not torch.equal(labels.values[ours], back.values[theirs]):
        raise ValueError(f"{codec.name}: a value is not one that this codec gives")
    if labels.tails is not None and not torch.equal(labels.tails, back.tails):
        raise ValueError(f"{codec.name}: a tail is not one that this codec gives")


def _require_below(what: str, numbers: NDArray[np.int64] | NDArray[np.int32], limit: int) -> None:
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
        raise ValueError(f"{what} must lie in [0, {limit}), got {int(numbers.min())} to {int(numbers.max())}")


def _by_id(ids: NDArray[np.int32], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How to sort entries by id within each row."""
    order: NDArray[np.int64] = np.lexsort((ids, np.repeat(np.arange(len(counts)), counts)))
    return order
