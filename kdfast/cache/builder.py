"""The shard being written: records gather into blocks, blocks into a file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast._C import crc32c
from kdfast.cache.codecs.base import Codec
from kdfast.cache.container import pack
from kdfast.cache.keys import Key
from kdfast.labels import SoftLabels

__all__ = ["ShardBuilder"]

RECORD_TABLE_BYTES = 32  # key and span
MAX_PENDING_VALUES = 2**22  # of a block not yet encoded: 16 MiB


class ShardBuilder:
    """Holds one shard in memory. A block closes after the record that brings it to ``block_rows`` rows."""

    def __init__(self, codec: Codec, block_rows: int) -> None:
        self._codec = codec
        self._block_rows = block_rows
        self._keys: list[Key] = []
        self._spans: list[tuple[int, int]] = []
        self._payload: list[bytes] = []
        self._index: list[tuple[int, int, int, int]] = []
        self._pending: list[SoftLabels] = []
        self._rows = self._blocked_rows = self._bytes = self._pending_values = 0

    @property
    def records(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """About the size of the file so far."""
        return self._bytes + RECORD_TABLE_BYTES * self.records

    def add(self, key: Key, labels: SoftLabels) -> None:
        self._keys.append(key)
        self._spans.append((self._rows, len(labels)))
        self._rows += len(labels)
        if len(labels):
            self._pending.append(labels)
        self._pending_values += labels.values.numel()
        if self._rows - self._blocked_rows >= self._block_rows or self._pending_values >= MAX_PENDING_VALUES:
            self._close_block()

    def finish(self, metadata: dict[str, str]) -> list[bytes]:
        """The file, in pieces. The builder keeps its contents, so that a failed write can be tried again."""
        self._close_block()
        tables: dict[str, NDArray[Any]] = {
            "block_index": np.array(self._index, np.int64).reshape(-1, 4),
            "record_spans": np.array(self._spans, np.int64).reshape(-1, 2),
            "record_keys": np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 16),
            "block_crc": np.array([crc32c(block) for block in self._payload], np.uint32),
        }
        before, after = pack(metadata, self._bytes, tables)
        return [before, *self._payload, after]

    def _close_block(self) -> None:
        rows = self._rows - self._blocked_rows
        if rows:
            block = self._codec.encode(SoftLabels.cat(self._pending))
            self._index.append((self._bytes, len(block), self._blocked_rows, rows))
            self._payload.append(block)
            self._bytes += len(block)
            self._blocked_rows = self._rows
        self._pending.clear()
        self._pending_values = 0
