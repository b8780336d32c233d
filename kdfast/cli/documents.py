"""Documents for ``kdfast cache capture``, from files: texts, JSON lines and Parquet, compressed or not."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdfast._optional import import_optional
from kdfast.cache import CacheError
from kdfast.cache.capture.corpus import Document, document_of

__all__ = ["documents"]


def documents(files: Sequence[Path], field: str | None) -> Iterator[Document]:
    """Iterate over documents: one per file, per line of a .jsonl file, or per row of a .parquet file.

    A line or row is taken by its ``field``, or by the one of text, messages and input_ids that it has. Files whose name
    ends in .gz are compressed. Blank lines are left out.

    Raises:
        CacheError: a file or line that holds no document, naming it.
        OSError: a file cannot be read.
    """
    for file in files:
        kind = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
        rows = {".jsonl": _lines, ".parquet": _parquet}.get(kind)
        if rows is None:
            yield _text(file)
            continue
        for where, row in rows(file):
            yield _document(row, where, field)


def _document(row: Any, where: str, field: str | None) -> Document:
    if not isinstance(row, Mapping):
        raise CacheError(f"{where}: must be an object with the field {field or 'text'!r}, got {type(row).__name__}")
    try:
        found = document_of(row, field)
    except ValueError as error:
        raise CacheError(f"{where}: {error}") from error
    whole = isinstance(found, str) or (
        isinstance(found, list) and all(isinstance(x, (int, Mapping)) and not isinstance(x, bool) for x in found)
    )
    if not whole:
        raise CacheError(f"{where}: must be a text, messages or ids, got {json.dumps(found, default=str)[:60]}")
    return found  # type: ignore[no-any-return]


def _text(file: Path) -> str:
    with _readable(str(file)), _open(file) as text:
        return text.read()


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield each line of a file of JSON lines with where it is."""
    number = 0
    with _open(file) as lines:
        while True:
            with _readable(f"{file}, after line {number}"):
                line = lines.readline()
            if not line:
                return
            number += 1
            if line.strip():
                yield f"{file}, line {number}", _parse(line, f"{file}, line {number}")


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{where}: is no JSON: {error}") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    parquet = import_optional("pyarrow.parquet", "reading Parquet files", extra="convert")
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
    except (ValueError, OSError) as error:
        raise CacheError(f"{file}: is no Parquet file: {error}") from error


def _open(file: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(gzip.open(file) if file.suffix == ".gz" else file.open("rb"), "utf-8")


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """A context in which bytes that are no text, or no compressed one, raise ``CacheError``."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CacheError(f"{where}: is no UTF-8 text: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CacheError(f"{where}: is no whole gzip file: {error}") from error
