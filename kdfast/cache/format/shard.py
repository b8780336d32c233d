"""One shard: its tables and payload mapped into memory, every block checked when it is first read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdfast._atomic import with_filename
from kdfast._C import crc32c, last_at_most
from kdfast.cache.codecs.base import Addressable, Codec, FixedWidthCodec
from kdfast.cache.errors import CacheCorruptError, CacheError
from kdfast.cache.format.container import Container, read_container
from kdfast.cache.format.floor import FloorSums
from kdfast.cache.format.meta import RANGE, CacheMeta
from kdfast.cache.format.strict import parse_integer, parse_json
from kdfast.labels import SoftLabels

__all__ = ["MAX_FIRST", "MAX_ROWS", "ONE_ROW_EACH", "Outline", "Shard", "Units"]

ONE_ROW_EACH = {"spans": "one"}  # metadata of a shard whose records need no spans

MAX_ROWS = 2**31  # of one block or record: keeps every sum below within 64 bits
# What a block may claim beyond doubt: rows that take less than a bit each are all but equal.
FREE_ROWS, CREDIBLE_ROWS_PER_BYTE = 2**16, 8
MAX_FIRST = 2**62  # below: integer keys do not overflow
ROUNDING = 1e-3  # nats a row
CHUNK = 8192  # table rows checked at a time: what a check allocates does not grow with the table


class Units(NamedTuple):
    """Where some rows are in a shard's payload, in the units that a codec decodes."""

    ranges: NDArray[np.int64]  # (units, 2): first byte in the payload, length
    counts: NDArray[np.int64]  # (units,): rows of each
    wanted: NDArray[np.int64]  # the rows asked for, numbered over these units


class Outline(NamedTuple):
    """The records of a shard: how many, and how they are numbered."""

    records: int
    first_record: int  # where keys are consecutive integers: that of the first record
    one_row_each: bool

    @classmethod
    def of(cls, container: Container) -> Outline:
        """Read the outline. Raises ``CacheError`` for an unknown kind of spans, ``ValueError`` for nonsense."""
        metadata, blocks = container.metadata, container.tables["block_index"]
        if metadata.get("spans", "one") != "one":
            raise CacheError(f"has spans {metadata['spans']!r}, which this kdfast does not read")
        given = metadata.get("first_record", "0")
        try:
            first = parse_integer(given, 0, MAX_FIRST - 1)
        except ValueError as error:
            raise ValueError(f"its first_record {given:.40} is out of range") from error
        rows = int(blocks[-1, 2:].sum()) if len(blocks) else 0
        one_row_each = "spans" in metadata
        return cls(rows if one_row_each else len(container.tables["record_spans"]), first, one_row_each)


class Shard:
    """A sealed shard file.

    Nothing is kept in memory but a flag per block. It pickles as its path and seal: the copy maps the file again,
    and checks it again.

    Raises:
        CacheCorruptError: the file is not what was written.
        CacheError: it is, but of another format version.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = read_container(path)
        tables = self._container.tables
        self.keys: NDArray[np.uint8] = tables["record_keys"]
        self._spans, self._index, self._crc = tables["record_spans"], tables["block_index"], tables["block_crc"]
        self.model = tables["codec_model"].tobytes() if "codec_model" in tables else b""
        self.targets: NDArray[np.uint32] | None = tables.get("record_targets")  # (records,)
        self.views: NDArray[np.uint8] | None = tables.get("row_views")  # (rows, 13)
        try:
            self.meta = CacheMeta.from_strings(self._container.metadata)
            self.records, self.first_record, self._one_row_each = Outline.of(self._container)
            self._check_tables()
            self.cross_entropy = _cross_entropy(self._container.metadata, self.rows, self.targets is not None)
            self.floor = FloorSums.from_metadata(self._container.metadata, self.rows)
        except CacheError as error:
            raise type(error)(f"{path}: {error}") from error
        except ValueError as error:
            raise CacheCorruptError(f"{path}: {error}") from error
        self._checked = np.zeros(len(self._index), bool)
        self._payload: NDArray[np.uint8] | None = None

    @property
    def rows(self) -> int:
        return int(self._index[-1, 2:].sum()) if len(self._index) else 0

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

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.seal)

    def require_width(self, codec: FixedWidthCodec) -> None:
        """Raise ``CacheCorruptError`` unless each block has the length that ``codec`` gives its rows."""
        for start, chunk in _chunks(self._index):
            length, rows = chunk[:, 1], chunk[:, 3]
            for at in np.flatnonzero(length != rows * codec.row_bytes)[:1]:
                raise CacheCorruptError(
                    f"{self.path}: block {start + at}: {rows[at]} rows of {codec.row_bytes} bytes expected, "
                    f"found {length[at]} bytes"
                )

    def require_room(self, rows_per_byte: int, trusted: bool) -> None:
        """Check that blocks have the bytes for the rows that they claim, before room is made for these.

        Raises:
            CacheCorruptError: a block's bytes cannot hold its rows.
            CacheError: they could, but no teacher's labels are as short; not raised where the cache is ``trusted``.
        """
        for start, chunk in _chunks(self._index):
            length, rows = chunk[:, 1], chunk[:, 3]
            for at in np.flatnonzero(-(-rows // rows_per_byte) > length)[:1]:
                raise CacheCorruptError(
                    f"{self.path}: block {start + at}: {length[at]} bytes cannot hold {rows[at]} rows"
                )
            for at in np.flatnonzero(rows > FREE_ROWS + CREDIBLE_ROWS_PER_BYTE * length)[: 0 if trusted else 1]:
                raise CacheError(
                    f"{self.path}: block {start + at}: claims {rows[at]} rows in {length[at]} bytes, which would take "
                    f"far more memory than the file; if you know where it comes from, open it with trusted=True"
                )

    def spans(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, 2): the first row and the number of rows of each of ``records``."""
        if self._one_row_each:
            return np.stack([records, np.ones_like(records)], 1)
        spans: NDArray[np.int64] = self._spans.take(records, 0)
        return spans

    def units(self, rows: NDArray[np.int64], codec: Codec) -> Units:
        """Where ``rows`` are to be read. A block's checksum is checked when it is first asked for.

        Raises:
            CacheCorruptError: a block is not what was written; the message names it.
        """
        blocks = self.blocks_of(rows)
        for number in np.unique(blocks[~self._checked[blocks]]).tolist():
            block = self.block(number)
            if isinstance(codec, Addressable) and codec.addressable:
                self._check_index(number, block, codec)
        if isinstance(codec, Addressable) and codec.addressable:
            return Units(self._locate(blocks, rows, codec), np.ones_like(rows), np.arange(len(rows)))
        numbers, inverse = np.unique(blocks, return_inverse=True)
        entries = self._index.take(numbers, 0)
        counts = entries[:, 3]
        skipped = counts.cumsum() - counts - entries[:, 2]  # what a row's number gains when units are counted
        return Units(entries[:, :2], counts, rows + skipped[inverse])

    def decode(self, number: int, rows: NDArray[np.int64], codec: Codec) -> SoftLabels:
        """The labels of ``rows``, which lie in block ``number``, in the order given."""
        ranges, counts, wanted = self.units(rows, codec)
        try:
            return codec.decode(self.payload(), np.column_stack([ranges, counts]), wanted)
        except ValueError as error:
            raise self._corrupt(number, error) from error

    def blocks_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The block that each of ``rows`` lies in: the last one that starts at or before it."""
        blocks: NDArray[np.int64] = last_at_most(self._index, 2, rows)
        return blocks

    def block(self, number: int) -> NDArray[np.uint8]:
        """A block's bytes, checked against its CRC the first time."""
        offset, length = self._index[number, :2].tolist()
        data = self.payload()[offset : offset + length]
        if not self._checked[number]:
            found, stored = crc32c(data), int(self._crc[number])
            if found != stored:
                raise CacheCorruptError(f"{self.path}: block {number}: CRC is {found:08x}, the index says {stored:08x}")
            self._checked[number] = True
        return data

    def payload(self) -> NDArray[np.uint8]:
        """The bytes of all blocks, mapped into memory and not checked yet."""
        if self._payload is None:
            with with_filename(self.path):
                if self.path.stat().st_size != self.file_bytes:
                    raise CacheCorruptError(f"{self.path}: has changed size since it was opened")
            start = self._container.payload_start
            self._payload = self._container.mapped[start : start + self.payload_bytes]
        return self._payload

    def verify(self) -> None:
        """Read the whole file again and check every byte. Raises ``CacheCorruptError``."""
        fresh = _reopen(self.path, self.seal)
        for number in range(len(fresh._index)):
            fresh.block(number)

    def _locate(self, blocks: NDArray[np.int64], rows: NDArray[np.int64], codec: Addressable) -> NDArray[np.int64]:
        entries = self._index.take(blocks, 0)
        places, within = entries[:, [0, 1, 3]], rows - entries[:, 2]
        try:
            return codec.locate(self.payload(), places, within)
        except ValueError:
            for number in np.unique(blocks).tolist():
                chosen = blocks == number
                try:
                    codec.locate(self.payload(), places[chosen], within[chosen])
                except ValueError as error:
                    raise self._corrupt(number, error) from error
            raise

    def _check_index(self, number: int, block: NDArray[np.uint8], codec: Addressable) -> None:
        try:
            codec.check_index(block, int(self._index[number, 3]))
        except ValueError as error:
            self._checked[number] = False
            raise self._corrupt(number, error) from error

    def _corrupt(self, number: int, error: ValueError) -> CacheCorruptError:
        return CacheCorruptError(f"{self.path}: block {number}: {error}")

    def _check_tables(self) -> None:
        """Raise unless blocks tile the payload and the rows, and records tile the rows, each within a block."""
        _check_tiling("blocks", self._index[:, :2], 0, self.payload_bytes, self.payload_bytes)
        _check_tiling("block rows", self._index[:, 2:], 1, MAX_ROWS, self.rows)
        if self._one_row_each and len(self._spans):
            raise ValueError("its records have one row each, but spans too")
        if not self._one_row_each:
            _check_tiling("records", self._spans, 0, MAX_ROWS, self.rows)
            self._check_crossings()
        keys = 0 if self.meta.keys == RANGE else self.records
        targets = self.records if self.targets is None else len(self.targets)
        views = self.rows if self.views is None else len(self.views)
        if (len(self._crc), len(self.keys), targets, views) != (len(self._index), keys, self.records, self.rows):
            raise ValueError("its tables differ in length")
        if ("first_record" in self._container.metadata) != (self.meta.keys == RANGE):
            raise ValueError(f"its keys are {self.meta.keys!r}, which its first_record does not go with")

    def _check_crossings(self) -> None:
        """Raise unless every block ends where a record does."""
        seen = 0  # blocks whose ends have been looked for
        for _, chunk in _chunks(self._spans):
            ends = chunk[:, 0] + chunk[:, 1]
            # Block n ends where block n + 1 starts.
            last = int(ends[-1])
            done = int(last_at_most(self._index, 2, ends[-1:])[0]) if last < self.rows else len(self._index)
            wanted = self._index[seen:done, 2] + self._index[seen:done, 3]
            if (ends[np.searchsorted(ends, wanted).clip(max=len(ends) - 1)] != wanted).any():
                raise ValueError("a record crosses the end of a block")
            seen = done


def _reopen(path: Path, seal: str) -> Shard:
    shard = Shard(path)
    if shard.seal != seal:
        raise CacheCorruptError(f"{path}: has been replaced since it was opened")
    return shard


def _chunks(table: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield ``table`` in parts: the number of a part's first row, and its rows."""
    for start in range(0, len(table), CHUNK):
        yield start, table[start : start + CHUNK]


def _check_tiling(what: str, table: NDArray[np.int64], smallest: int, largest: int, total: int) -> None:
    """Raise unless the (begin, size) rows of ``table`` follow one another without a gap from 0 to ``total``."""
    end = 0
    for _, chunk in _chunks(table):
        begin, size = chunk.T
        if ((size < smallest) | (size > largest)).any():
            raise ValueError(f"its {what} have an impossible size")
        ends = size.cumsum() + end
        if (begin != ends - size).any():
            raise ValueError(f"its {what} do not follow one another without a gap")
        end = int(ends[-1])
    if end != total:
        raise ValueError(f"its {what} end at {end}, not at {total}")


def _cross_entropy(metadata: dict[str, str], rows: int, expected: bool) -> tuple[float, int] | None:
    """The teacher's cross-entropy on the targets: its sum in nats, and the number of targets, at most ``rows``."""
    if ("targets" in metadata) != expected:
        raise ValueError("it has record_targets without metadata on them, or the other way round")
    if not expected:
        return None
    try:
        targets = parse_json(metadata["targets"])
    except ValueError as error:
        raise ValueError(f"its targets cannot be read: {error}") from error
    if not isinstance(targets, dict) or targets.keys() != {"cross_entropy_sum", "count"}:
        raise ValueError(f"its targets are no sum and count: {metadata['targets']:.80}")
    total, count = targets["cross_entropy_sum"], targets["count"]
    # A cross-entropy is not negative, but for rounding.
    if type(total) is not float or type(count) is not int or not 0 <= count <= rows or total < -ROUNDING * count:
        raise ValueError(f"its targets are not a sum over at most {rows} rows: {metadata['targets']:.80}")
    return total, count
