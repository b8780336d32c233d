"""Importing another tool's records into a cache, with an account of what they leave out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.cache import codecs
from kdfast.cache.convert.report import BiasReport
from kdfast.cache.convert.rows import BrokenRowError, ImportedRows, to_rows
from kdfast.cache.convert.source import Record, Source
from kdfast.cache.errors import CacheError
from kdfast.cache.write.writer import Writer
from kdfast.labels import TopK

__all__ = ["TOLERANCE", "import_records", "store_records"]

# How far above 1 a row's probabilities may add up. bfloat16 log-probabilities are off by up to 2**-9 of themselves,
# which is .8 % of the probability for a row of 4 nats of entropy.
TOLERANCE = 0.01


def import_records(
    source: Source,
    destination: str | os.PathLike[str],
    *,
    vocab_size: int,
    codec: str = "topk",
    k: int | None = None,
    value_dtype: str | None = None,
    teacher: str = "",
    tolerance: float = TOLERANCE,
    drop_broken: bool = False,
    progress: Callable[[], None] | None = None,
    **options: Any,
) -> BiasReport:
    """Store the records of ``source`` as top-k labels at T = 1, the tail being what the entries leave of 1.

    Records that the cache holds already are skipped, so that an import that was cut short can be run again.

    Args:
        source: ``DistillKit``, ``TopKLogProbs`` or ``Megatron``.
        destination: the cache's directory, new or holding a cache of the same kind.
        vocab_size: of the teacher.
        codec: ``"topk"``.
        k: entries to keep per row, the largest; what is dropped joins the tail. Default: all.
        value_dtype: default: one that holds the stored values exactly.
        teacher: the teacher's fingerprint.
        tolerance: how far above 1 the probabilities of a row may add up.
        drop_broken: leave out records with a broken row (a row by itself cannot go: the others would shift) and say
            so in the report.
        progress: called after each record.
        options: of the codec or the ``Writer``.

    Raises:
        CacheError: a record that is not of the format, or has a broken row: its name, the row and the fault.
        CacheMismatchError: the directory holds a cache of another kind.
    """
    if codecs.find(codec).kind != TopK.kind:
        raise CacheError(f"{source.what} holds top-k log-probabilities: they can be stored as topk, not as {codec}")
    if not tolerance >= 0:
        raise CacheError(f"tolerance must be at least 0, got {tolerance}")
    k = source.k if k is None else k
    if k > source.k:
        raise CacheError(f"k={k} entries are wanted, but {source.what} has at most {source.k}")
    k = min(k, vocab_size)
    value_dtype = value_dtype or source.value_dtype
    report = BiasReport(source.what)
    stored = {"codec": codec, "k": k, "value_dtype": value_dtype, "teacher": teacher, **options}
    cut = partial(to_rows, vocab_size=vocab_size, k=k, value_dtype=value_dtype, tolerance=tolerance)
    with Writer(destination, vocab_size=vocab_size, **stored) as writer:
        store_records(source, cut, writer, report, drop_broken=drop_broken, progress=progress)
    return report


def store_records(
    records: Iterable[Record],
    cut: Callable[[Record], ImportedRows],
    writer: Writer,
    report: BiasReport,
    *,
    drop_broken: bool = False,
    progress: Callable[[], None] | None = None,
) -> None:
    """Store the labels that ``cut`` makes of each record, and count them in ``report``.

    Args:
        cut: ``to_rows`` with its options.
        drop_broken, progress: as ``import_records`` takes them.

    Raises:
        CacheError: a record has a broken row.
    """
    for record in records:
        try:
            rows = cut(record)
        except BrokenRowError as error:
            if not drop_broken:
                raise
            report.dropped.append(str(error))
        else:
            _store(writer, record, rows, report)
        if progress is not None:
            progress()


def _targets(record: Record) -> Tensor:
    """(rows,) int64: the token that follows each row, -1 where it is not known."""
    following = np.full(len(record.counts), -1)
    known = record.token_ids[1 : len(following) + 1]
    following[: len(known)] = known
    return torch.from_numpy(following)


def _store(writer: Writer, record: Record, rows: ImportedRows, report: BiasReport) -> None:
    if record.key in writer:
        report.duplicates += 1
        return
    writer.add_labels(record.key, rows.labels, targets=_targets(record))
    report.count(rows.mass, len(rows.ids))
    report.count_targets(record, rows.row, rows.ids)
