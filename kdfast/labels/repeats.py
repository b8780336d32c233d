"""Values of soft labels' entries that a loss relies on: ids in their range, and each once in a row.

Padding is no entry: a log-probability of -inf or a weight of 0 may stand beside any id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.labels.entries import rows_of_entries

__all__ = ["check_ids", "check_offsets", "check_prototype_ids", "is_readable", "merged_repeats"]


def is_readable(x: Tensor) -> bool:
    """Whether the values of ``x`` can be looked at without waiting for a device, or breaking a trace."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def check_offsets(offsets: Tensor, entries: int) -> None:
    """Raise ``ValueError`` unless offsets begin at 0, do not go back, and end at the number of entries."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != entries or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            f"offsets must begin at 0, never go back and end at the number of entries, {entries}, got "
            f"{_shown(offsets)}; torch.nn.functional.pad(counts.cumsum(0), (1, 0)) makes them of the rows' counts"
        )


def check_prototype_ids(prototype_ids: Tensor, count: int) -> None:
    """Raise ``ValueError`` unless each is a row of a table of ``count`` prototypes."""
    if prototype_ids.numel() and not 0 <= int(prototype_ids.min()) <= int(prototype_ids.max()) < count:
        raise ValueError(
            f"soft labels must name prototypes in [0, {count}), got {int(prototype_ids.min())} to "
            f"{int(prototype_ids.max())}"
        )


def check_ids(ids: Tensor, offsets: Tensor, padding: Tensor, size: int, *, once: str | None) -> None:
    """Raise ``ValueError``, naming the row, for an id out of [0, size), or one that a row names twice.

    Args:
        ids, padding: (nnz,), padding bool: ids that do not count.
        once: how to mend a row that names an id twice; None: it may.
    """
    live = ids.masked_fill(padding, 0)
    if live.numel() and not 0 <= int(live.min()) <= int(live.max()) < size:
        at = int(((live < 0) | (live >= size)).nonzero()[0, 0])
        raise ValueError(
            f"soft labels must name tokens in [0, {size}), got {int(live.min())} to {int(live.max())}, first in row "
            f"{_row_of(offsets, at)}; pad with a log-probability of -inf or a weight of 0, whose id does not matter"
        )
    if once is None:
        return
    # Padding gets numbers of its own, which no two entries share.
    place = torch.arange(len(ids), device=ids.device)
    key = torch.where(padding, -1 - place, _row_major(ids, offsets, size))
    if bool((key[1:] > key[:-1]).all()):
        return
    key, order = key.sort()
    twice = (key[1:] == key[:-1]).nonzero()[:, 0]
    if len(twice):
        at = int(order[twice[0]])
        raise ValueError(f"soft labels must name a token once per row, got {int(ids[at])} twice in row "
                         f"{_row_of(offsets, at)}; {once}")  # fmt: skip


def merged_repeats(ids: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """(nnz,) weights where the first of a row's entries of one id has the sum of all, and the others 0.

    Nothing waits for a device: the number of entries stays.
    """
    key = _row_major(ids, offsets, 1 << 32)
    if is_readable(key) and bool((key[1:] > key[:-1]).all()):
        return weights
    key, order = key.sort(stable=True)
    first = torch.cat([key.new_ones(1, dtype=torch.bool), key[1:] != key[:-1]])[: len(key)]
    if is_readable(key) and bool(first.all()):
        return weights
    group = first.cumsum(0) - 1
    sums = torch.zeros_like(weights, dtype=torch.float64).index_add(0, group, weights[order].double())
    return torch.zeros_like(weights).index_copy(0, order, torch.where(first, sums[group], 0.0).to(weights.dtype))


def _row_major(ids: Tensor, offsets: Tensor, size: int) -> Tensor:
    """(nnz,) int64 numbers that two entries share when they name one id in one row; ids lie in [-size / 2, size)."""
    return rows_of_entries(offsets, len(ids)) * size + ids


def _row_of(offsets: Tensor, entry: int) -> int:
    return int((offsets[1:] <= entry).sum())


def _shown(offsets: Tensor) -> str:
    most = 8
    return f"{offsets[:most].tolist()}{' and more' if len(offsets) > most else ''}"
