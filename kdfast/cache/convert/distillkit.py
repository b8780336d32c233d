"""``DistillKit``: compressed teacher log-probabilities in Parquet, as arcee-ai's DistillKit captures them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.convert.distillkit_layout import read_layout
from kdfast.cache.convert.parquet import matrix, parquet_files, parquet_records, row_count
from kdfast.cache.convert.source import Record, Source, named, token_ids
from kdfast.cache.errors import CacheError

__all__ = ["DistillKit"]

CONFIG = "compression_config.yaml"
CHUNK_ROWS = 1024  # rows decoded at a time: bits are spread to a byte each


class DistillKit(Source):
    """A folder of Parquet files, or one, with the config that they were captured with.

    A file's row is a sample. Its rows of labels are those of its tokens in order; vLLM gives none after the last
    token, so that there is one fewer, unless the capture has added a padding token.

    Args:
        path: the file or folder.
        config: the compression config, YAML or JSON. Default: ``compression_config.yaml`` in the folder.
        max_bytes: what a file's row group may take once it is unpacked. Default: 256 MiB, or 64 times what it takes in
            the file if that is more.

    Raises:
        ExpansionError: a row group takes more than ``max_bytes``.
        CacheError: the config or a file is not there, or is not what DistillKit writes.
    """

    what = "DistillKit"

    def __init__(self, path: Path, config: Path | None = None, max_bytes: int | None = None) -> None:
        self._files = parquet_files(path)
        config = config or self._files[0].parent / CONFIG
        if not config.exists():
            raise CacheError(f"{config}: is not there: give the config that the capture was made with")
        self._layout, self._max_bytes = read_layout(config), max_bytes
        self.k, self.value_dtype = self._layout.k, self._layout.value_dtype
        self.size = sum(map(row_count, self._files))

    def __iter__(self) -> Iterator[Record]:
        names = ["input_ids", *self._layout.columns]
        for path in self._files:
            for number, row in enumerate(parquet_records(path, names, max_bytes=self._max_bytes)):
                name = f"{path}: sample {number}"
                with named(name):
                    record = self._record(name, row)
                yield record

    def _record(self, name: str, row: dict[str, Any]) -> Record:
        inner = getattr(row["input_ids"], "values", None)
        if inner is None or inner.null_count:
            raise CacheError(f"{name}: input_ids are null, or no list")
        tokens = token_ids(inner.to_numpy(zero_copy_only=False))
        layout = self._layout
        columns = {
            column: matrix(row[column], layout.nbytes(column), f"{name}: {column}", layout.kind(column))
            for column in layout.columns
        }
        lengths = {column: len(table) for column, table in columns.items()}
        rows = lengths[layout.columns[0]]
        if len(set(lengths.values())) != 1 or not len(tokens) - 1 <= rows <= len(tokens):
            raise CacheError(f"{name}: has {len(tokens)} input_ids, but rows {lengths}: as many or one fewer expected")
        ids, values = self._decode(columns, rows)
        counts = np.full(rows, layout.k)
        return Record(name, tokens, counts, ids.reshape(-1), values.reshape(-1))

    def _decode(self, columns: dict[str, NDArray[Any]], rows: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        parts = [
            {name: table[start : start + CHUNK_ROWS] for name, table in columns.items()}
            for start in range(0, max(rows, 1), CHUNK_ROWS)
        ]
        return (
            np.concatenate([self._layout.ids(part) for part in parts]),
            np.concatenate([self._layout.log_probs(part) for part in parts]),
        )
