"""``Writer``: teacher logits in, shards out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from kdfast.cache import codecs
from kdfast.cache.builder import ShardBuilder
from kdfast.cache.codecs.base import Codec
from kdfast.cache.errors import CacheError
from kdfast.cache.keys import Key, describe, make_key
from kdfast.cache.manifest import SHARD_NAME, load_shards, write_manifest
from kdfast.cache.meta import CacheMeta
from kdfast.cache.publish import publish

__all__ = ["Writer"]


class Writer:
    """Writes a cache, or adds to one. Use it as a context manager.

    Leaving the ``with`` block publishes the last shard and the manifest; leaving it by an exception drops the shard
    in progress and keeps those already sealed. Several writers may fill one directory at once if their ``writer``
    names differ. What is on disk depends on the records and their order alone, never on time.

    Memory: one shard at most, and about 100 bytes per record for its key.

    Args:
        path: the cache's directory, made if need be.
        vocab_size: the width of the logits.
        codec: ``"topk"`` or ``"dense"`` (see ``kdfast.cache.codecs``).
        temperatures: the teacher temperatures that a loss will use.
        teacher: a fingerprint of the teacher. A cache takes rows of one teacher only.
        writer: this writer's name in its files' names, such as the rank: letters, digits and ``_``.
        shard_bytes: a shard is sealed after the block that brings it to this size.
        block_rows: a block is closed after the record that brings it to this many rows.
        options: the codec's own: ``k``, ``value_dtype``, ...

    Raises:
        CacheMismatchError: the directory holds a cache with another codec, vocabulary, temperatures or teacher.
        CacheCorruptError: the directory holds a corrupt shard.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        codec: str,
        temperatures: Sequence[float] = (1.0,),
        teacher: str = "",
        writer: str = "0",
        shard_bytes: int = 256 * 2**20,
        block_rows: int = 1024,
        **options: Any,
    ) -> None:
        if not re.fullmatch("[A-Za-z0-9_]+", writer):
            raise ValueError(f"writer must consist of letters, digits and _, got {writer!r}")
        if shard_bytes < 1 or block_rows < 1:
            raise ValueError(f"shard_bytes and block_rows must be positive, got {shard_bytes} and {block_rows}")
        self._codec = codecs.create(codec, vocab_size, temperatures, options)
        self._meta = CacheMeta.of(self._codec, teacher)
        self._path, self._name = Path(path), writer
        self._shard_bytes, self._block_rows = shard_bytes, block_rows
        self._builder = ShardBuilder(self._codec, block_rows)
        self._seen: set[Key] = set()
        self._next = 0
        self._closed = False
        self.records = self.rows = self.duplicates = 0
        self._path.mkdir(parents=True, exist_ok=True)
        self._continue()

    def _continue(self) -> None:
        """Take up where the directory's shards end."""
        for shard in load_shards(self._path):
            self._meta.require_equal(shard.meta, "this writer", str(shard.path))
            self._seen.update(Key(row.tobytes()) for row in shard.keys)
            name = SHARD_NAME.fullmatch(shard.path.name)
            if name is not None and name[1] == self._name:
                self._next = int(name[2]) + 1

    def __contains__(self, key: Any) -> bool:
        """Whether ``key`` has been written, now or before: its teacher pass can be skipped."""
        return make_key(key) in self._seen

    def add(self, key: Any, logits: Tensor) -> None:
        """Store one record. If ``key`` is there already the first record stays, and ``duplicates`` counts this one.

        Args:
            key: token ids (a 1-D integer tensor), or a name (str, bytes or int).
            logits: (rows, vocab_size), or (vocab_size,) for a single row; any float dtype and device. -inf masks.

        Raises:
            TypeError, ValueError: a key or logits of the wrong kind or shape.
            ValueError: a row holds NaN or +inf or no finite value, or cannot be stored within the codec's error.
                The message names key and row; the record is not added.
            OSError: a shard cannot be written.
        """
        if self._closed:
            raise CacheError(f"the writer of {self._path} is closed")
        digest = make_key(key)
        try:
            rows = _check_logits(logits, self._codec)
            if digest in self._seen:
                self.duplicates += 1
                return
            labels = self._codec.select(rows, digest).to("cpu")
        except TypeError as error:
            raise TypeError(f"{describe(key)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{describe(key)}: {error}") from error
        self._builder.add(digest, labels)
        self._seen.add(digest)
        self.records += 1
        self.rows += len(labels)
        if self._builder.nbytes >= self._shard_bytes:
            self._seal()

    def close(self) -> None:
        """Publish what is left and the manifest. A second call does nothing."""
        if not self._closed:
            if self._builder.records:
                self._seal()
            if self._next:
                write_manifest(self._path)
            self._closed = True

    def _seal(self) -> None:
        path = self._path / f"shard-{self._name}-{self._next:05d}.safetensors"
        if path.exists():
            raise CacheError(f"{path} appeared while this writer was at work: give each writer its own name")
        publish(path, self._builder.finish(self._meta.to_strings()))
        self._builder = ShardBuilder(self._codec, self._block_rows)
        self._next += 1

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self._closed = True


def _check_logits(logits: Tensor, codec: Codec) -> Tensor:
    """``logits`` as (rows, width), every row fit to be selected from."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{codec.input_name} must be a floating-point tensor, got {got}")
    width = codec.input_width
    rows = logits[None] if logits.dim() == 1 else logits
    if rows.dim() != 2 or rows.shape[1] != width:
        raise ValueError(f"{codec.input_name} must be (rows, {width}) or ({width},), got {tuple(logits.shape)}")
    # The maximum is NaN or +inf if any column is, and -inf if no column is finite.
    largest = rows.detach().amax(1)
    for row in (~largest.isfinite()).nonzero().flatten().tolist()[:1]:
        value = float(largest[row])
        problem = "no finite value" if value == -torch.inf else f"a value of {value}"
        raise ValueError(f"row {row} has {problem}")
    return rows
