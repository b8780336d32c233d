"""``export``: writing a cache as one Parquet file, for tools that know nothing of kdfast."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from kdfast._atomic import replacing
from kdfast._paths import local_path
from kdfast.cache.errors import CacheError, optional_package
from kdfast.cache.format.keys import Key
from kdfast.cache.read.reader import CacheInfo, open_cache
from kdfast.cache.read.walk import RecordBatch, walk
from kdfast.labels import Dense, Ragged, SoftLabels, TopK, Weights

__all__ = ["export"]

KINDS = (TopK, Weights, Dense)


def export(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Callable[[int], None] | None = None
) -> int:
    """Write every record of a cache as a row of a Parquet file, duplicates left out. Returns how many.

    Columns, the lists being ``large_list``, whose offsets have 64 bits:

    ========= ====================== ========================================================================
    key       string                 the record's key in hexadecimal; an integer in decimal
    rows      int64                  its rows
    counts    list of int32          the entries of each row (not for dense labels)
    ids       list of int32          the entries' ids, row after row (not for dense labels)
    log_probs list of float32        their log-probabilities at T = 1, or all columns' for dense labels
    weights   list of float32        instead, for labels that are weights; of codec scored both are there
    tails     list of float32        for top-k labels: per row the log-mass outside, one for each temperature
    ========= ====================== ========================================================================

    The schema's metadata has ``kdfast``: kind, codec, options, vocabulary, temperatures and teacher, as JSON.

    Args:
        path: the cache's directory.
        out: the file, which appears when it is whole: a name that ends in .parquet.
        progress: called with the number of records written since it was called last.

    Raises:
        CacheError: pyarrow is not installed, the cache is empty, or its labels are of a kind that no column can hold.
        OSError: the file cannot be written.
    """
    if os.path.splitext(os.fspath(out))[1] not in ("", ".parquet", ".pq"):
        raise CacheError(f"{out} would be a Parquet file: give it a name that ends in .parquet")
    arrow, parquet = (optional_package(name, "writing Parquet") for name in ("pyarrow", "pyarrow.parquet"))
    cache = open_cache(path)
    records = 0
    with replacing(local_path(out)) as part:
        writer = None
        for batch in walk(path, cache):
            table = _table(arrow, batch, cache.info)
            writer = writer or parquet.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table)  # a row group, as small as the batch
            records += len(batch.keys)
            if progress is not None:
                progress(len(batch.keys))
        if writer is None:
            raise CacheError(f"{path}: holds no record to export")
        writer.close()
    return records


def _table(arrow: Any, batch: RecordBatch, about: CacheInfo) -> Any:
    if not isinstance(batch.labels, KINDS):
        known = ", ".join(labels.kind for labels in KINDS)
        raise CacheError(f"{batch.labels.kind} labels have no Parquet form: only {known} can be exported")
    rows = [_row(key, labels) for key, labels in batch.records()]
    lists = {"counts": arrow.int32(), "ids": arrow.int32()}
    columns = {
        "key": arrow.array([row["key"] for row in rows], arrow.string()),
        "rows": arrow.array([row["rows"] for row in rows], arrow.int64()),
    }
    for name in list(rows[0])[2:]:
        of = arrow.large_list(lists.get(name, arrow.float32()))
        columns[name] = arrow.array([row[name] for row in rows], of)
    described = {
        "kind": batch.labels.kind,
        "codec": about.codec,
        "config": about.config,
        "vocab_size": about.vocab_size,
        "temperatures": about.temperatures,
        "teacher": about.teacher,
    }
    return arrow.table(columns).replace_schema_metadata({"kdfast": json.dumps(described)})


def _row(key: Key | int, labels: SoftLabels) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key.hex() if isinstance(key, Key) else str(key), "rows": len(labels)}
    if isinstance(labels, Ragged):
        row["counts"] = labels.counts.int().numpy()
        row["ids"] = labels.ids.numpy()
    name = "weights" if isinstance(labels, Weights) else "log_probs"
    row[name] = labels.values.float().reshape(-1).numpy()
    if isinstance(labels, Weights) and labels.log_probs is not None:
        row["log_probs"] = labels.log_probs.numpy()
    if isinstance(labels, TopK):
        row["tails"] = labels.tails.T.contiguous().reshape(-1).numpy()
    return row
