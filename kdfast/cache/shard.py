"""One shard: its tables in memory, its payload mapped, every block checked when it is first read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast._C import crc32c
from kdfast.cache.codecs.base import Codec, FixedWidthCodec
from kdfast.cache.container import read_container
from kdfast.cache.errors import CacheCorruptError, CacheError, naming
from kdfast.cache.meta import CacheMeta
from kdfast.labels import SoftLabels

__all__ = ["Shard"]

MAX_ROWS = 2**31  # of one block or record: keeps every sum below within 64 bits


class Shard:
    """A sealed shard file.

    It pickles without its map: the copy maps the file again on first use, and checks its blocks again.

    Raises:
        CacheCorruptError: the file is not what was written.
        CacheError: it is, but of another format version.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = read_container(path)
        tables = self._container.tables
        self.keys, self.spans = tables["record_keys"], tables["record_spans"]
        self._index, self._crc = tables["block_index"], tables["block_crc"]
        try:
            self.meta = CacheMeta.from_strings(self._container.metadata)
            self._check_tables()
        except CacheError as error:
            raise type(error)(f"{path}: {error}") from error
        except ValueError as error:
            raise CacheCorruptError(f"{path}: {error}") from error
        self._first_rows = np.ascontiguousarray(self._index[:, 2])
        self._checked = np.zeros(len(self._index), bool)
        self._map: NDArray[np.uint8] | None = None

    @property
    def rows(self) -> int:
        return int(self._index[:, 3].sum())

    @property
    def payload_bytes(self) -> int:
        return self._container.payload_bytes

    @property
    def file_bytes(self) -> int:
        return self._container.file_bytes

    @property
    def seal(self) -> str:
        """The file's seal in hexadecimal: a fingerprint of everything in it, blocks included (by their CRCs)."""
        return self._container.seal.hex()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "_checked": np.zeros_like(self._checked)}

    def require_width(self, codec: FixedWidthCodec) -> None:
        """Raise ``CacheCorruptError`` unless each block is its rows one after another: ``packed`` counts on it."""
        length, rows = self._index[:, 1], self._index[:, 3]
        for number in np.flatnonzero(length != rows * codec.row_bytes)[:1]:
            raise CacheCorruptError(
                f"{self.path}: block {number}: {rows[number]} rows of {codec.row_bytes} bytes expected, "
                f"found {length[number]} bytes"
            )

    def packed(self, rows: NDArray[np.int64], row_bytes: int) -> NDArray[np.void]:
        """The bytes of ``rows``, as ``require_width`` has found them, in that order."""
        blocks = self.blocks_of(rows)
        for number in np.unique(blocks[~self._checked[blocks]]):
            self.block(int(number))
        return self._payload().view(f"V{row_bytes}").take(rows)

    def decode(self, number: int, rows: NDArray[np.int64], codec: Codec) -> SoftLabels:
        """The labels of ``rows``, which lie in block ``number``, in that order."""
        block = self.block(number)
        try:
            unit = np.array([[0, len(block), self._index[number, 3]]])
            return codec.decode(block, unit, rows - self._first_rows[number])
        except ValueError as error:
            raise CacheCorruptError(f"{self.path}: block {number}: {error}") from error

    def blocks_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The block that each of ``rows`` lies in: the last one that starts at or before it."""
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def block(self, number: int) -> NDArray[np.uint8]:
        """A block's bytes, checked against its CRC the first time."""
        offset, length = (int(n) for n in self._index[number, :2])
        data = self._payload()[offset : offset + length]
        if not self._checked[number]:
            found, stored = crc32c(data), int(self._crc[number])
            if found != stored:
                raise CacheCorruptError(f"{self.path}: block {number}: CRC is {found:08x}, the index says {stored:08x}")
            self._checked[number] = True
        return data

    def verify(self) -> None:
        """Read the whole file again and check every byte. Raises ``CacheCorruptError``."""
        fresh = Shard(self.path)
        if fresh.seal != self.seal:
            raise CacheCorruptError(f"{self.path}: has been replaced since it was opened")
        for number in range(len(fresh._index)):
            fresh.block(number)

    def _payload(self) -> NDArray[np.uint8]:
        if self._map is None:
            with naming(self.path):
                if self.path.stat().st_size != self.file_bytes:
                    raise CacheCorruptError(f"{self.path}: has changed size since it was opened")
                start = self._container.payload_start
                whole = np.asarray(np.memmap(self.path, np.uint8, "r"))  # a plain array slices faster
                self._map = whole[start : start + self.payload_bytes]
        return self._map

    def _check_tables(self) -> None:
        """Blocks tile the payload and the rows; records tile the rows, each within a block."""
        offset, length, first, rows = self._index.T
        total = int(rows.sum())
        if len(self._crc) != len(self._index) or len(self.keys) != len(self.spans):
            raise ValueError("its tables differ in length")
        _check_tiling("blocks", offset, length, self.payload_bytes, self.payload_bytes)
        _check_tiling("block rows", first, rows, total, MAX_ROWS)
        _check_tiling("records", self.spans[:, 0], self.spans[:, 1], total, MAX_ROWS)
        if (rows == 0).any():
            raise ValueError("a block is empty")
        if not np.isin(first + rows, self.spans.sum(1)).all():
            raise ValueError("a record crosses the end of a block")


def _check_tiling(what: str, begin: NDArray[Any], size: NDArray[Any], total: int, largest: int) -> None:
    """Each part starts where the one before it ends, from 0 to ``total``."""
    if ((size < 0) | (size > largest)).any():
        raise ValueError(f"its {what} have an impossible size")
    ends = np.cumsum(size)
    if (begin != ends - size).any() or (int(ends[-1]) if len(ends) else 0) != total:
        raise ValueError(f"its {what} do not follow one another without a gap")
