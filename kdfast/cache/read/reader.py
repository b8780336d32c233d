"""``open``: a cache's labels by key."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.auto import FAR, choose
from kdfast.cache.codecs.base import Codec
from kdfast.cache.errors import CacheCorruptError, CacheError, CacheMismatchError
from kdfast.cache.format.floor import FloorSums
from kdfast.cache.format.keys import Key, describe
from kdfast.cache.format.manifest import load_shards, no_shard
from kdfast.cache.format.meta import RANGE
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.sorted_keys import INDEX, read_index, sort_keys, verify_index
from kdfast.cache.format.storage import open_storage
from kdfast.cache.format.targets import targets_crc
from kdfast.cache.format.view import View, unpack_views
from kdfast.cache.read.decoder import Decoder
from kdfast.cache.read.gather import RowGatherer, groups, ranges
from kdfast.cache.read.lookup import HashLookup, Lookup, RangeLookup, RecordIndex
from kdfast.cache.read.packed import PackedLabels
from kdfast.cache.read.spans import check_several, check_spans, split_spans
from kdfast.labels import Floor, SoftLabels
from kdfast.labels.head import OutputLayer
from kdfast.labels.ragged import Weights

__all__ = ["CacheInfo", "CacheReader", "open_cache"]


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds. ``rows`` and the bytes count every stored record, ``duplicates`` included."""

    codec: str
    config: dict[str, Any]
    vocab_size: int
    temperatures: tuple[float, ...]
    teacher: str
    keys: str
    shards: int
    records: int
    duplicates: int
    rows: int
    payload_bytes: int
    file_bytes: int  # of the shards
    asset_bytes: int  # of what lies beside them and does not grow with them: a table of prototypes
    index_bytes: int  # of index.safetensors, which can be made again
    index: str  # what a key is looked up in: index.safetensors, or memory (and why), or none for keys="range"
    cross_entropy: float | None  # the teacher's on the targets, in nats, mean over all; None if no shard has any
    shard_cross_entropy: tuple[float | None, ...]  # shard by shard: one that stands out was misaligned
    floor: Floor | None = None  # how near to the teacher these labels bring a student; None: not measured, or no floor
    noise: str = ""  # of labels that are drawn, which have noise in place of a floor: what it is of

    @property
    def floor_text(self) -> str:
        """``floor`` in words, or why there is none."""
        if self.noise:
            return f"none: unbiased, with {self.noise}"
        return "not measured" if self.floor is None else self.floor.text()

    @property
    def codec_reason(self) -> str:
        """Why ``codec="auto"`` takes this codec for such a teacher; empty where it takes another one."""
        choices = (
            choose(self.vocab_size, self.temperatures, prototypes=self.asset_bytes > 0, student_kl=distance)
            for distance in (None, FAR)
        )
        return next((choice.reason for choice in choices if choice.name == self.codec), "")

    @property
    def why(self) -> str:
        """``codec_reason``, under the name it had before 0.2."""
        return self.codec_reason


def open_cache(
    path: str | os.PathLike[str],
    *,
    head: OutputLayer | tuple[Tensor, Tensor | None] | None = None,
    trusted: bool = False,
    shrink: float = 0.0,
) -> CacheReader:
    """Open a cache for reading.

    Headers, tables and keys are checked now; a payload block when it is first used. Files are mapped into memory:
    what this takes does not grow with the cache, as long as ``index.safetensors`` is there, which a writer leaves.

    Args:
        path: a directory, or a URL that fsspec knows, whose files are then downloaded once.
        head: the teacher's output layer, or its (weight, bias), for a cache of hidden states: a loss needs it. It must
            be, bit for bit, the one whose fingerprint the cache was written with; keep it on the training device.
        trusted: read blocks that claim far more rows than bytes, too, as labels that are all equal give. Decoded they
            take far more memory than the file, so that one from a stranger is refused.
        shrink: of a cache of draws with prototypes (``codec="sample", prototypes=256``): how far each row is moved to
            its prototype, a part of the way in [0, 1] (``SoftLabels.shrunk``). 0 is right for a student that comes near
            its teacher, .8 was best for one 4 nats away. The labels are then prototype labels, for any divergence.

    Raises:
        ValueError: ``shrink`` is outside [0, 1], or the cache has no draws with prototypes.
        CacheCorruptError: a shard is corrupt or truncated; the message names it.
        CacheError: there is no shard, or one of another format version, or an asset is missing, or a block claims rows
            that take far more memory than the file and the cache is not ``trusted``.
        CacheMismatchError: the shards are not of one cache, or ``head`` is another one than theirs.
        OSError: the directory or a file cannot be read.
    """
    storage = open_storage(path)
    shards = load_shards(storage)
    if not shards:
        raise no_shard(storage)
    for shard in shards:
        Decoder.of(shard, storage.fetch)
    index = storage.fetch(INDEX) if storage.exists(INDEX) else shards[0].path.with_name(INDEX)
    layer = OutputLayer(*head) if isinstance(head, tuple) else head
    reader = CacheReader(storage.url, shards, index, layer, trusted, shrink)
    len(reader)  # finds the keys now
    return reader


class CacheReader:
    """A cache open for reading: a mapping from keys to ``SoftLabels``. ``kdfast.cache.open`` makes it.

    It pickles, so that ``DataLoader`` workers can have it. Files are mapped into memory: they must not be cut short
    while they are open (published shards never change).
    """

    def __init__(
        self,
        path: str,
        shards: list[Shard],
        index_file: Path,
        head: OutputLayer | None = None,
        trusted: bool = False,
        shrink: float = 0.0,
    ) -> None:
        self._path, self._shards, self._index_file, self._head = path, shards, index_file, head
        self._trusted = trusted
        self._decoders = [Decoder.of(shard) for shard in shards]
        if head is not None:
            self._use_head(head)
        self._shrink = _check_shrink(shrink, self.codec, path)
        self._gatherer = RowGatherer(shards, self._decoders, trusted)
        self._floor = _floor_of(shards)
        self._seals = blake2b("".join(shard.seal for shard in shards).encode(), digest_size=16).digest()
        # What tells a run's labels from others: shrunk by another share they are others.
        self._fingerprint = self._seals + (repr(self._shrink).encode() if self._shrink else b"")

    def _use_head(self, head: OutputLayer) -> None:
        for decoder in self._decoders:
            try:
                decoder.codec.use_head(head)
            except ValueError as error:
                raise CacheMismatchError(f"{self._path}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReader, (self._path, self._shards, self._index_file, self._head, self._trusted, self._shrink)

    # ---- labels -----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> SoftLabels:
        """The labels of one record, or of a span (key, start, length). Raises ``KeyError`` naming the key."""
        return self.gather([key])

    def gather(self, keys: Iterable[Any] | RecordIndex) -> SoftLabels:
        """The labels of several records, concatenated in the order of ``keys``, which may repeat.

        Args:
            keys: keys, such as the ids of one record as a tensor or a list; spans (key, start, length), which are rows
                ``start`` to ``start + length - 1`` of a record; None for an absent row, (None, 0, n) for n of them; all
                of these mixed; or what ``index`` has made of them.

        Raises:
            KeyError: a key is not in the cache.
            ValueError: a span goes beyond its record; the message names key and range.
            CacheCorruptError: a block is corrupt; the message names shard and block.
            CacheError: the index was made for other shards.
        """
        where = self._locate(keys)
        try:
            return self._pack(*where).unpack()
        except CacheCorruptError:
            self._gatherer.explain(*where)
            raise

    def pack(self, keys: Iterable[Any] | RecordIndex) -> PackedLabels:
        """The labels of ``keys``, as ``gather`` takes them, still compressed: to be decoded later and elsewhere.

        ``gather(keys)`` is ``pack(keys).unpack()``.
        """
        return self._pack(*self._locate(keys))

    def _pack(self, *where: Any) -> PackedLabels:
        # Shrunk labels are others than those whose floor was measured.
        floor = None if self._shrink else self._floor
        return replace(self._gatherer.pack(*where), floor=floor, shrink=self._shrink)

    def index(self, keys: Iterable[Any]) -> RecordIndex:
        """Look up keys once, for any number of ``gather``: hashing a key takes longer than reading a row.

            index = cache.index(all_keys)
            labels = cache.gather(index[batch])  # batch: positions in all_keys

        Args:
            keys: as ``gather`` takes them. Where keys are consecutive integers also a 1-D integer tensor or array, or
                a range.

        Raises:
            TypeError: one name instead of a list of keys, or a key of another type.
            KeyError: a key is not in the cache; the message says why, if that shows.
            ValueError: a span goes beyond its record.
        """
        check_several(keys, self)
        entries: Any = keys if isinstance(keys, (Tensor, np.ndarray, range)) else list(keys)
        found, spans, absent = split_spans(entries)
        records = np.full(len(entries), -1)
        records[~absent] = self._find(found)
        if spans is not None:
            rows = np.iinfo(np.int64).max * absent  # any number of rows may be absent
            rows[~absent] = self._gatherer.spans(records[~absent])[1][:, 1]
            check_spans(entries, spans, rows)
        return RecordIndex(records, self._seals, spans)

    # ---- what goes with the labels -----------------------------------------------------------------------------------

    def views(self, key: Any) -> list[View]:
        """The ``View`` of each row of the record ``key``: what was done to its sample before the teacher saw it.

        Raises:
            KeyError: the key is not in the cache.
            CacheError: the record was stored without views.
            CacheCorruptError: they are not what a writer stores.
        """
        (record,) = self._find([key])
        owner, ((first, rows),) = self._gatherer.spans(np.array([record]))
        shard = self._shards[int(owner[0])]
        if shard.views is None:
            raise CacheError(f"{shard.path}: was written without views")
        try:
            return unpack_views(shard.views[first : first + rows])
        except ValueError as error:
            raise CacheCorruptError(f"{shard.path}: from row {first} on: {error}") from error

    def check_targets(self, keys: Iterable[Any], targets: Iterable[Tensor | Sequence[int]]) -> None:
        """Compare a student's targets with those that the teacher saw: a shifted or re-tokenised corpus fails here.

        Args:
            keys: some records' keys.
            targets: for each, the ids that its rows predict, negative where there is nothing to predict.

        Raises:
            CacheMismatchError: targets differ; the message names the first record.
            KeyError: a key is not in the cache.
            CacheError: a record was stored without targets.
            ValueError: there are not as many targets as keys.
        """
        entries = keys if isinstance(keys, (Tensor, np.ndarray, range)) else list(keys)
        ids_of = list(targets)
        if len(ids_of) != len(entries):
            raise ValueError(f"{len(entries)} keys need as many targets, got {len(ids_of)}")
        records = self._find(entries)
        owners = np.searchsorted(self._gatherer.starts, records, side="right") - 1
        local = records - self._gatherer.starts[owners]
        for at, ids in enumerate(ids_of):
            shard = self._shards[int(owners[at])]
            if shard.targets is None:
                raise CacheError(f"{shard.path}: was written without targets")
            if targets_crc(torch.as_tensor(ids, dtype=torch.int64).reshape(-1).cpu()) != shard.targets[local[at]]:
                raise CacheMismatchError(
                    f"the targets of {describe(entries[at])} are not those that {shard.path} was written with: "
                    "the data is shifted, tokenised otherwise, or another"
                )

    def target_checksums(self, keys: Iterable[Any] | RecordIndex) -> NDArray[np.int64]:
        """(n,) the CRC-32C of each record's targets, as ``FORMAT.md`` defines it; -1 where there is none, or no record.

        Args:
            keys: some records' keys, which need not be in the cache, or what ``index`` has made of them.
        """
        records, owners = self._owners(keys)
        checksums = np.full(len(records), -1)
        for owner, places in groups(owners):
            shard = self._shards[owner]
            if owner >= 0 and shard.targets is not None:
                checksums[places] = shard.targets[records[places] - self._gatherer.starts[owner]]
        return checksums

    def row_counts(self, keys: Iterable[Any] | RecordIndex) -> NDArray[np.int64]:
        """(n,) how many rows the record of each key has; -1 where there is no record. ``keys``: as above."""
        records, owners = self._owners(keys)
        return np.where(owners < 0, -1, self._gatherer.spans(records)[1][:, 1])

    def _owners(self, keys: Iterable[Any] | RecordIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) record numbers, and (n,) the shards that hold them; -1 where there is none."""
        if isinstance(keys, RecordIndex):
            records = keys.records
        else:
            records = self._lookup.find(keys if isinstance(keys, (Tensor, np.ndarray, range)) else list(keys))
        return records, np.searchsorted(self._gatherer.starts, records, side="right") - 1

    # ---- keys -------------------------------------------------------------------------------------------------------

    def __contains__(self, key: Any) -> bool:
        return bool(self._lookup.find([key])[0] >= 0)

    def __len__(self) -> int:
        return self._lookup.records

    def __iter__(self) -> Iterator[Key | int]:
        """Iterate over the records' keys in the order they were written."""
        return iter(self._lookup)

    def keys(self) -> Iterator[Key | int]:
        """Iterate over the records' keys in the order they were written."""
        return iter(self)

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Read every file again and check every byte, and the index against the shards' keys.

        Raises:
            CacheCorruptError: naming shard and block, or the index.
        """
        for shard in self._shards:
            shard.verify()
        if self._shards[0].meta.keys != RANGE:
            verify_index(self._index_file, self._shards)

    @property
    def nbytes(self) -> int:
        """The bytes of the labels themselves, without keys and indices."""
        return sum(shard.payload_bytes for shard in self._shards)

    @property
    def info(self) -> CacheInfo:
        """What the cache holds, as one table of numbers."""
        meta = self._shards[0].meta
        marks = [shard.cross_entropy for shard in self._shards]
        total = sum(mark[0] for mark in marks if mark), sum(mark[1] for mark in marks if mark)
        return CacheInfo(
            **vars(meta),
            shards=len(self._shards),
            records=len(self),
            duplicates=self._lookup.duplicates,
            rows=sum(shard.rows for shard in self._shards),
            payload_bytes=self.nbytes,
            file_bytes=sum(shard.file_bytes for shard in self._shards),
            asset_bytes=sum(map(len, self.codec.assets().values())),
            index_bytes=self._index_file.stat().st_size if self._index_file.exists() else 0,
            index=self._lookup.note,
            cross_entropy=_mean(total),
            shard_cross_entropy=tuple(map(_mean, marks)),
            floor=self._floor,
            noise=self.codec.noise,
        )

    @property
    def floor(self) -> Floor | None:
        """How near to the teacher these labels bring a student; None: not measured, or drawn labels, without a floor.

        It is measured when a cache is written, on rows spread over all of it, and comes with the labels:
        ``SoftLabels.floor``.
        """
        return self._floor

    @property
    def codec(self) -> Codec:
        """The codec, ready to decode. Where shards have models of their own it is the first shard's."""
        return self._decoders[0].codec

    def __repr__(self) -> str:
        codec = self._shards[0].meta.codec
        return f"CacheReader({self._path!r}, codec={codec!r}, records={len(self)}, bytes={self.nbytes})"

    @cached_property
    def _lookup(self) -> Lookup:
        # Not made before it is needed: a worker that has a RecordIndex never looks up a key.
        if self._shards[0].meta.keys == RANGE:
            return RangeLookup(self._shards, self._gatherer.starts)
        keys, note = read_index(self._index_file, self._shards)
        if keys is None:
            keys, note = sort_keys(self._shards), f"in memory: {note}"
        return HashLookup(self._shards, self._gatherer.starts, keys, note)

    def _find(self, keys: Any) -> NDArray[np.int64]:
        records = self._lookup.find(keys)
        for position in np.flatnonzero(records < 0)[:1]:
            raise KeyError(f"{describe(keys[position])} is not in {self._path}{self._lookup.hint(keys[position])}")
        return records

    def _locate(
        self, keys: Iterable[Any] | RecordIndex
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_] | None]:
        """The shard of each row of ``keys``, its number there, and which rows are present, None standing for all."""
        index = keys if isinstance(keys, RecordIndex) else self.index(keys)
        if index.shards != self._seals:
            raise CacheError(f"{self._path}: the index was made for other shards than these: make it again")
        owners, spans = self._gatherer.spans(index.records)
        if index.spans is None:
            return np.repeat(owners, spans[:, 1]), ranges(*spans.T), None
        whole = index.spans[:, 1] < 0
        sizes = np.where(whole, spans[:, 1], index.spans[:, 1])
        rows = ranges(spans[:, 0] + index.spans[:, 0], sizes)
        return np.repeat(owners, sizes), rows, np.repeat(index.records >= 0, sizes)


def _check_shrink(share: float, codec: Codec, path: str) -> float:
    """``share``, if labels of this codec can be shrunk by it."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"shrink must lie in [0, 1], got {share}")
    if share and (codec.kind != Weights.kind or not codec.assets()):
        raise ValueError(
            f"{path}: shrink={share} moves draws to their prototypes, and this {codec.name} cache has none: capture "
            'with codec="sample", prototypes=256'
        )
    return float(share)


def _floor_of(shards: list[Shard]) -> Floor | None:
    sums = FloorSums.total(shard.floor for shard in shards)
    return None if sums is None else sums.floor(shards[0].meta.temperatures[0])


def _mean(total: tuple[float, int] | None) -> float | None:
    return total[0] / total[1] if total and total[1] else None
