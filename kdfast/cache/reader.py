"""``open``: a cache's labels by key."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.auto import choose
from kdfast.cache.errors import CacheError, CacheMismatchError
from kdfast.cache.index import RecordIndex
from kdfast.cache.keys import DIGEST_BYTES, Key, describe, make_key, make_keys
from kdfast.cache.manifest import load_shards
from kdfast.cache.rows import Rows
from kdfast.cache.shard import Shard
from kdfast.head import OutputLayer
from kdfast.labels import SoftLabels

__all__ = ["CacheInfo", "CacheReader", "open_cache"]


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds. ``rows`` and the bytes count every stored record, ``duplicates`` included."""

    codec: str
    config: dict[str, Any]
    vocab_size: int
    temperatures: tuple[float, ...]
    teacher: str
    shards: int
    records: int
    duplicates: int
    rows: int
    payload_bytes: int
    file_bytes: int

    @property
    def why(self) -> str:
        """Why ``codec="auto"`` takes this codec for such a teacher; empty where it takes another one."""
        choice = choose(self.vocab_size, self.temperatures)
        return choice.why if choice.name == self.codec else ""


def open_cache(
    path: str | os.PathLike[str], *, head: OutputLayer | tuple[Tensor, Tensor | None] | None = None
) -> CacheReader:
    """Open a cache directory for reading.

    Headers, indices and keys are read and checked now; a payload block when it is first used.

    Args:
        head: the teacher's output layer, or its (weight, bias), for a cache of hidden states: a loss needs it. It must
            be, bit for bit, the one whose fingerprint the cache was written with; keep it on the training device.

    Raises:
        CacheCorruptError: a shard is corrupt or truncated; the message names it.
        CacheError: there is no shard, or one of another format version.
        CacheMismatchError: the shards are not of one cache, or ``head`` is another one than theirs.
        OSError: the directory or a file cannot be read.
    """
    directory = Path(path)
    shards = load_shards(directory)
    if not shards:
        raise CacheError(f"{directory}: holds no shard of a kdfast cache")
    reader = CacheReader(directory, shards)
    if head is not None:
        try:
            reader._codec.use_head(OutputLayer(*head) if isinstance(head, tuple) else head)
        except ValueError as error:
            raise CacheMismatchError(f"{directory}: {error}") from error
    return reader


class CacheReader:
    """A cache open for reading: a mapping from keys to ``SoftLabels``. ``kdfast.cache.open`` makes it.

    It pickles, so that ``DataLoader`` workers can have it. Files are mapped into memory: they must not be cut short
    while they are open (published shards never change).
    """

    def __init__(self, path: Path, shards: list[Shard]) -> None:
        self._path, self._shards = path, shards
        try:
            self._codec = shards[0].meta.make_codec(lambda name: (path / name).read_bytes())
        except (TypeError, ValueError) as error:
            raise CacheError(f"{path}: cannot be decoded: {error}") from error
        self._rows = Rows(shards, self._codec)
        self._fingerprint = blake2b("".join(shard.seal for shard in shards).encode(), digest_size=16).digest()
        self._starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        # Record r holds rows first[r] ... first[r + 1] - 1, numbered over all shards.
        self._first = np.concatenate([[0], *(shard.spans[:, 1] for shard in shards)]).cumsum()
        digests = np.concatenate([shard.keys for shard in shards]).view(f"S{DIGEST_BYTES}").ravel()
        # Sorted digests and their records. Of equal ones the first stays.
        self._digests, self._records = np.unique(digests, return_index=True)

    def __getitem__(self, key: Any) -> SoftLabels:
        """The labels of one record. Raises ``KeyError`` naming the key."""
        return self.gather([key])

    def gather(self, keys: Iterable[Any] | RecordIndex) -> SoftLabels:
        """The labels of several records, concatenated in the order of ``keys``, which may repeat.

        Args:
            keys: keys, or some that ``index`` has looked up.

        Raises:
            KeyError: a key is not in the cache.
            CacheCorruptError: a block is corrupt; the message names shard and block.
            CacheError: the index was made for other shards.
        """
        index = keys if isinstance(keys, RecordIndex) else self.index(keys)
        if index.shards != self._fingerprint:
            raise CacheError(f"{self._path}: the index was made for other shards than these: make it again")
        return self._rows.labels(_ranges(self._first[index.records], self._first[index.records + 1]))

    def index(self, keys: Iterable[Any]) -> RecordIndex:
        """Look up keys once, for any number of ``gather``: hashing a key takes longer than reading a row.

            index = cache.index(all_keys)
            labels = cache.gather(index[batch])  # batch: positions in all_keys

        Raises:
            KeyError: a key is not in the cache.
        """
        keys = keys if isinstance(keys, (Tensor, np.ndarray)) else list(keys)
        records = self._find(make_keys(keys))
        for position in np.flatnonzero(records < 0)[:1]:
            raise KeyError(f"{describe(keys[position])} is not in {self._path}")
        return RecordIndex(records, self._fingerprint)

    def __contains__(self, key: Any) -> bool:
        return bool(self._find([make_key(key)])[0] >= 0)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Key]:
        """The records' keys in the order they were written."""
        for record in np.sort(self._records).tolist():
            owner = int(np.searchsorted(self._starts, record, side="right")) - 1
            yield Key(self._shards[owner].keys[record - self._starts[owner]].tobytes())

    def keys(self) -> Iterator[Key]:
        """The same."""
        return iter(self)

    def verify(self) -> None:
        """Read every file again and check every byte. Raises ``CacheCorruptError`` naming shard and block."""
        for shard in self._shards:
            shard.verify()

    @property
    def nbytes(self) -> int:
        """The size of the labels themselves, without keys and indices."""
        return sum(shard.payload_bytes for shard in self._shards)

    @property
    def info(self) -> CacheInfo:
        meta = self._shards[0].meta
        return CacheInfo(
            **vars(meta),
            shards=len(self._shards),
            records=len(self),
            duplicates=int(self._starts[-1]) - len(self),
            rows=sum(shard.rows for shard in self._shards),
            payload_bytes=self.nbytes,
            file_bytes=sum(shard.file_bytes for shard in self._shards),
        )

    def __repr__(self) -> str:
        return f"CacheReader({str(self._path)!r}, codec={self._codec.name!r}, records={len(self)}, bytes={self.nbytes})"

    def _find(self, keys: list[Key]) -> NDArray[np.int64]:
        """Record numbers over all shards; -1 where there is none."""
        wanted = np.frombuffer(b"".join(keys), self._digests.dtype)
        if not len(self._digests):
            return np.full(len(wanted), -1)
        at = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        return np.where(self._digests[at] == wanted, self._records[at], -1)


def _ranges(begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """``begin[i] ... end[i] - 1`` for each i, one after another."""
    sizes = end - begin
    ends = sizes.cumsum()
    # Number n of the result sits ``n - (ends - sizes)[i]`` past its range's begin.
    return np.repeat(begin - (ends - sizes), sizes) + np.arange(ends[-1] if len(ends) else 0)
