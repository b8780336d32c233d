"""Reading Parquet files a few rows at a time, and nested lists as arrays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.errors import CacheCorruptError, CacheError, optional_package

__all__ = ["matrix", "parquet_files", "parquet_records", "row_count"]

BATCH = 16  # samples at a time: of 8,192 tokens and 350 bytes a token, 46 MB


def parquet_files(path: Path) -> list[Path]:
    """``path`` itself, or the Parquet files of a folder, numbers in their names in numeric order."""
    if not path.is_dir():
        return [path]
    files = sorted(path.rglob("*.parquet"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    if not files:
        raise CacheError(f"{path}: holds no Parquet file")
    return files


def row_count(path: Path) -> int:
    """The number of rows of the file at ``path``."""
    return int(_open(path).metadata.num_rows)


def parquet_records(path: Path, columns: list[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield each row as pyarrow scalars by column: ``columns``, and those of ``optional`` that the file has.

    Raises:
        CacheError: pyarrow is not installed, or a column is missing; the message names it.
        CacheCorruptError: it is not a Parquet file.
    """
    file = _open(path)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise CacheError(f"{path}: lacks the columns {missing}; it has {file.schema_arrow.names}")
    columns = columns + [name for name in optional if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=BATCH, columns=columns):
        for row in range(batch.num_rows):
            yield {name: batch.column(name)[row] for name in columns}


def matrix(scalar: Any, width: int, what: str) -> NDArray[Any]:
    """A list of lists as a (lists, width) array. Raises ``CacheError`` if an inner list has another length."""
    inner = scalar.values
    if inner is None:
        raise CacheError(f"{what}: is null")
    numbers = inner.flatten().to_numpy(zero_copy_only=False)
    lengths = inner.value_lengths().to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(lengths != width)[:1]:
        raise CacheError(f"{what}: row {row} has {lengths[row]} numbers where its layout has {width}")
    return numbers.reshape(len(lengths), width)


def _open(path: Path) -> Any:
    arrow, parquet = (optional_package(name, "reading Parquet") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        return parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise CacheCorruptError(f"{path}: is not a readable Parquet file: {error}") from error
