"""Values of soft labels' entries that a loss relies on: ids in their range, and each once in a row.

Padding is no entry: a log-probability of -inf or a weight of 0 may stand beside any id. NumPy looks at tensors on a
CPU: it sorts many times faster than PyTorch does, and a few entries cost hardly a call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._checks import can_look
from kdfast.labels.entries import rows_of_entries

__all__ = ["check_ids", "check_offsets", "check_prototype_ids", "merged_repeats"]


def check_offsets(offsets: Tensor, entries: int) -> None:
    """Raise ``ValueError`` unless offsets begin at 0, do not go back, and end at the number of entries."""
    at = _values(offsets)
    if at[0] != 0 or at[-1] != entries or (at[1:] < at[:-1]).any():
        shown = f"{at[:8].tolist()}{' and more' if len(at) > 8 else ''}"
        raise ValueError(
            f"offsets must begin at 0, never go back and end at the number of entries, {entries}, got {shown}; "
            "torch.nn.functional.pad(counts.cumsum(0), (1, 0)) makes them of the rows' counts"
        )


def check_prototype_ids(prototype_ids: Tensor, count: int) -> None:
    """Raise ``ValueError`` unless each is a row of a table of ``count`` prototypes."""
    ids = _values(prototype_ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise ValueError(f"soft labels must name prototypes in [0, {count}), got {ids.min()} to {ids.max()}")


def check_ids(ids: Tensor, offsets: Tensor, padding: Tensor, size: int, *, once: str | None) -> None:
    """Raise ``ValueError``, naming the row, for an id out of [0, size), or one that a row names twice.

    Args:
        ids, padding: (nnz,), padding bool: ids that do not count.
        offsets: those of the rows, which ``check_offsets`` has passed.
        once: how to mend a row that names an id twice; None: it may.
    """
    live, starts, masked = _values(ids), _values(offsets), _values(padding)
    if masked.any():
        # Numbers that no two entries share, and below every id.
        live = np.where(masked, -1 - np.arange(len(live)), live)
    outside = (live >= size) | ((live < 0) & ~masked)
    if outside.any():
        row, named = _row_of(starts, int(outside.argmax())), live[~masked]
        raise ValueError(
            f"soft labels must name tokens in [0, {size}), got {named.min()} to {named.max()}, first in row {row}; "
            "pad with a log-probability of -inf or a weight of 0, whose id does not matter"
        )
    twice = None if once is None else _first_repeat(live, starts, masked)
    if twice is not None:
        row = _row_of(starts, twice)
        raise ValueError(f"soft labels must name a token once per row, got {live[twice]} twice in row {row}; {once}")


def merged_repeats(ids: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """(nnz,) weights where the first of a row's entries of one id has the sum of all, and the others 0.

    Nothing waits for a device: the number of entries stays.
    """
    if can_look(ids) and can_look(offsets) and _first_repeat(ids.numpy(), offsets.numpy()) is None:
        return weights
    key, order = ((rows_of_entries(offsets, len(ids)) << 32) + ids).sort(stable=True)
    first = torch.cat([key.new_ones(1, dtype=torch.bool), key[1:] != key[:-1]])[: len(key)]
    group = first.cumsum(0) - 1
    sums = torch.zeros_like(weights, dtype=torch.float64).index_add(0, group, weights[order].double())
    return torch.zeros_like(weights).index_copy(0, order, torch.where(first, sums[group], 0.0).to(weights.dtype))


def _first_repeat(ids: NDArray[Any], starts: NDArray[Any], masked: NDArray[Any] | None = None) -> int | None:
    """The place of an entry whose id its row names twice; None: there is none. ``masked`` entries have no equals."""
    counts = np.diff(starts)
    if not counts.size or counts.max() < 2:
        return None
    if counts.min() == counts.max():
        keys = ids.reshape(len(counts), -1)
    else:
        row = np.repeat(np.arange(len(counts), dtype=np.int64) << 32, counts)
        keys = np.where(masked, ids, row + ids)[None] if masked is not None else (row + ids)[None]
    if (keys[:, 1:] > keys[:, :-1]).all():
        return None
    ordered = np.sort(keys, axis=1)
    if not (ordered[:, 1:] == ordered[:, :-1]).any():
        return None
    order = np.argsort(keys, axis=1, kind="stable")
    line, column = np.argwhere(np.diff(np.take_along_axis(keys, order, 1), axis=1) == 0)[0]
    return int(line * keys.shape[1] + order[line, column])


def _values(x: Tensor) -> NDArray[Any]:
    return x.detach().cpu().numpy()


def _row_of(starts: NDArray[Any], entry: int) -> int:
    return int((starts[1:] <= entry).sum())
