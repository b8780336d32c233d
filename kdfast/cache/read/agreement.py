"""Comparing a batch's labels with the targets that its records were stored for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.errors import CacheMismatchError
from kdfast.cache.format.keys import describe
from kdfast.cache.format.targets import targets_crc
from kdfast.cache.read.lookup import RecordIndex
from kdfast.cache.read.reader import CacheReader

__all__ = ["check_labels"]

NONE = -100  # a position without a target


def check_labels(
    cache: CacheReader,
    index: RecordIndex,
    keys: Sequence[Any] | None,
    labels: Any,
    batch: Any = None,
    rows: NDArray[np.bool_] | None = None,
    ignore_index: int = NONE,
    certain: bool = False,
) -> None:
    """Raise unless a batch's labels may be the targets that its records were stored with, as far as both are known.

    A record agrees if its labels are its targets, or are once they are shifted by a token, as ``shift=True`` shifts
    them; or if the tokens that follow its ``input_ids`` are. Nothing is compared where labels are class probabilities,
    or a record has no label or was stored without targets.

    Args:
        cache: the labels.
        index: the batch's records.
        keys: their keys, for the message; None if they are not known.
        labels: of the batch: class ids, (records,) or (records, ...).
        batch: a mapping may have the ``input_ids``, a tuple may begin with ids.
        rows: (records, length) which rows of the labels the records have; None: all of them.
        ignore_index: a label that is none.
        certain: the keys are the records' own contents, so that a record of which some labels are ignored, as those of
            prompts are, need not be compared with the targets of all its tokens.

    Raises:
        CacheMismatchError: the labels of a record are not its targets.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.dim() or len(labels) != len(index):
        return
    stored = cache.target_checksums(index)
    if not len(stored) or bool((stored < 0).all()):
        return
    labels = labels.detach().long().cpu()
    labels = labels.masked_fill((labels == ignore_index) | (labels < 0), NONE).reshape(len(labels), -1)
    if labels.shape[1] == 1:
        agrees = _one_each(labels, stored)
    else:
        agrees = _sequences(stored, cache.row_counts(index), labels, _ids(batch, labels), rows, certain)
    for at in np.flatnonzero(~agrees)[:1]:
        name = f"record {at} of the batch" if keys is None else describe(keys[at])
        raise CacheMismatchError(
            f"the batch's labels of {name} are not the targets that the cache has of it, and so it is with "
            f"{int((~agrees).sum())} of {len(agrees)} records: their keys name other examples, as positions in a "
            "shuffled capture do, or the labels have changed. Key records by what they are; if the labels are meant to "
            "differ, compare_targets=False takes them as they are"
        )


def _one_each(labels: Tensor, stored: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(records,) whether records of one row each agree. Few classes need few checksums."""
    own = labels[:, 0].numpy()
    values, places = np.unique(own, return_inverse=True)
    checksums = np.array([targets_crc(torch.tensor([value])) for value in values.tolist()])
    agrees: NDArray[np.bool_] = (checksums[places] == stored) | (stored < 0) | (own < 0)
    return agrees


def _sequences(
    stored: NDArray[np.int64],
    counts: NDArray[np.int64],
    labels: Tensor,
    ids: Tensor | None,
    rows: NDArray[np.bool_] | None,
    certain: bool,
) -> NDArray[np.bool_]:
    """(records,) whether records of several rows agree."""
    agrees = np.ones(len(labels), bool)
    for at in np.flatnonzero(stored >= 0).tolist():
        kept = torch.ones(labels.shape[1], dtype=torch.bool) if rows is None else torch.from_numpy(rows[at])
        own = labels[at][kept]
        if len(own) != counts[at] or not bool((own >= 0).any()) or (certain and bool((own[:-1] < 0).any())):
            continue
        candidates = _candidates(labels[at], None if ids is None else ids[at], kept)
        agrees[at] = any(targets_crc(x) == stored[at] for x in candidates)
    return agrees


def _candidates(labels: Tensor, ids: Tensor | None, kept: Tensor) -> Iterator[Tensor]:
    """What a record's targets may have been: the labels or ids of its rows, as they are or those that follow."""
    for tokens in (labels, ids):
        if tokens is not None:
            yield tokens[kept]
            following = tokens.roll(-1)
            following[-1] = NONE
            yield following[kept]
            # The last token of a record has padding after it, or nothing.
            yield torch.cat([following[kept][:-1], torch.tensor([NONE])])


def _ids(batch: Any, labels: Tensor) -> Tensor | None:
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
    else:
        ids = batch[0] if isinstance(batch, (tuple, list)) and batch else None
    whole = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.shape == labels.shape
    return ids.long().cpu() if whole and ids is not None else None
