"""Reading Parquet files a few rows at a time, and nested lists as arrays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.convert.limits import ExpansionError, most_bytes
from kdfast.cache.errors import CacheCorruptError, CacheError, optional_package
from kdfast.cache.format.regular import open_regular

__all__ = ["matrix", "parquet_files", "parquet_records", "row_count"]

NUMBER_BYTES, TEXT_BYTES = 8, 32  # of a value in memory; a text is a token's id
BATCH = 16  # samples at a time: of 8,192 tokens and 350 bytes a token, 46 MB


def parquet_files(path: Path) -> list[Path]:
    """``path`` itself, or the Parquet files of a folder, numbers in their names in numeric order."""
    if not path.is_dir():
        return [path]
    # Names without numbers, or with the same ones, by name: the folder's own order is any.
    files = sorted(path.rglob("*.parquet"), key=lambda file: ([int(n) for n in re.findall(r"\d+", file.name)], file))
    if not files:
        raise CacheError(f"{path}: holds no Parquet file")
    return files


def row_count(path: Path) -> int:
    """The number of rows of the file at ``path``."""
    return int(_open(path).metadata.num_rows)


def parquet_records(
    path: Path, columns: list[str], optional: Sequence[str] = (), max_bytes: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield each row as pyarrow scalars by column: ``columns``, and those of ``optional`` that the file has.

    Args:
        max_bytes: what the columns of a row group may take once they are unpacked; None: ``most_bytes`` says.

    Raises:
        CacheError: pyarrow is not installed, or a column is missing; the message names it.
        ExpansionError: a row group takes more than ``max_bytes``.
        CacheCorruptError: it is not a Parquet file.
    """
    file = _open(path)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise CacheError(f"{path}: lacks the columns {missing}; it has {file.schema_arrow.names}")
    columns = columns + [name for name in optional if name in file.schema_arrow.names]
    arrow = optional_package("pyarrow", "reading Parquet")
    for group in range(file.metadata.num_row_groups):
        try:
            _require_room(path, file.metadata.row_group(group), group, columns, max_bytes)
            batches = file.iter_batches(batch_size=BATCH, columns=columns, row_groups=[group])
            for batch in batches:
                for row in range(batch.num_rows):
                    yield {name: batch.column(name)[row] for name in columns}
        except (arrow.ArrowException, OSError, UnicodeError) as error:
            raise CacheCorruptError(f"{path}: is not a readable Parquet file: {error}") from error


def _require_room(path: Path, group: Any, number: int, columns: Sequence[str], max_bytes: int | None) -> None:
    """Raise ``ExpansionError`` for a row group whose values, each at most as long as it could be, take too much.

    Runs of one value, and texts that a dictionary has once, take next to nothing in the file.
    """
    wanted = stored = 0
    for at in range(group.num_columns):
        column = group.column(at)
        if column.path_in_schema.split(".")[0] not in columns:
            continue
        stored += column.total_compressed_size
        wanted += NUMBER_BYTES * column.num_values
        if column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
            statistics = column.statistics
            # Without statistics, which writers leave out where a text is long, one may be as long as all of it.
            longest = column.total_uncompressed_size
            if statistics is not None and statistics.has_min_max:
                texts = [len(str(text)) for text in (statistics.min, statistics.max)]
                longest = min(longest, max(TEXT_BYTES, *texts))
            wanted += max(column.total_uncompressed_size, longest * column.num_values)
    most = most_bytes(max_bytes, stored)
    if wanted > most:
        raise ExpansionError.of(f"{path}: row group {number}", wanted, most)


def matrix(scalar: Any, width: int, what: str, kind: str) -> NDArray[Any]:
    """A list of lists of numbers as a (lists, width) array.

    Args:
        kind: "bytes" (uint8, or numbers of another type that are as small), "words" (uint64, or integers of 64 bits
            whose sign is the highest one) or "floats".

    Raises:
        CacheError: it is none, an inner list has another length, or a number is not of this kind.
    """
    inner = getattr(scalar, "values", None)
    if inner is None or not hasattr(inner, "value_lengths"):
        raise CacheError(f"{what}: is {'null' if scalar.as_py() is None else f'{scalar.type}, not lists of numbers'}")
    numbers = inner.flatten().to_numpy(zero_copy_only=False)
    if numbers.size and numbers.dtype.kind not in ("iuf" if kind == "floats" else "iu"):  # nulls make floats of them
        raise CacheError(f"{what}: holds {numbers.dtype} or nulls, where {kind} are expected")
    if kind == "bytes" and numbers.dtype != np.uint8:
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < 256:
            raise CacheError(f"{what}: holds numbers that are no bytes")
        numbers = numbers.astype(np.uint8)
    lengths = inner.value_lengths().to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(lengths != width)[:1]:
        raise CacheError(f"{what}: row {row} has {lengths[row]} numbers where its layout has {width}")
    return numbers.reshape(len(lengths), width)


def _open(path: Path) -> Any:
    arrow, parquet = (optional_package(name, "reading Parquet") for name in ("pyarrow", "pyarrow.parquet"))
    open_regular(path).close()  # whose errors are the system's; those below are about what the file holds
    try:
        file = parquet.ParquetFile(path)
        _ = file.schema_arrow.names
        return file
    except (arrow.ArrowException, OSError, UnicodeError) as error:
        raise CacheCorruptError(f"{path}: is not a readable Parquet file: {error}") from error
