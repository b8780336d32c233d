"""From records to shards: a codec learns from the first records, blocks are cut, shards are sealed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kdfast.cache.codecs.base import Codec
from kdfast.cache.format.storage import Storage
from kdfast.cache.write.records import Record
from kdfast.cache.write.unfinished import Unfinished
from kdfast.labels import SoftLabels

__all__ = ["BLOCK_ROWS", "MAX_BLOCK_VALUES", "SHARD_BYTES", "ShardBuilder"]

BLOCK_ROWS = 1024
SHARD_BYTES = 256 * 2**20
MAX_BLOCK_VALUES = 2**22  # of a block not yet encoded: 16 MiB


class ShardBuilder:
    """Turns a writer's records into shards, one block in memory at a time.

    Where blocks and shards end depends on the records and their order alone. ``advance`` does what is due; when it
    fails nothing is lost, and the next ``advance`` tries again.

    Args:
        codec: with its model, if it is known already.
        start: makes the n-th shard of this session, from 0.
        storage: where sealed shards and the codec's assets go.
        parked: records to write first, which the journal of the shard to resume holds already.
        block_rows: a block closes after the record that brings it to as many rows, or as many records.
        shard_bytes: a shard closes after the block that brings it to this size.
    """

    def __init__(
        self,
        codec: Codec,
        start: Callable[[int], Unfinished],
        storage: Storage,
        parked: list[Record],
        block_rows: int,
        shard_bytes: int,
    ) -> None:
        self._codec, self._start, self._storage = codec, start, storage
        self._block_rows, self._shard_bytes = block_rows, shard_bytes
        self._learning = codec.learn_rows > 0 and not codec.model
        self._waiting = deque(parked)  # for the model, or for the next ``advance``
        self._waiting_rows = sum(len(record.labels) for record in parked)
        self._noted = list(parked)  # what the journal has of the pending records, which are the first of them
        self._assets_there = False
        self._block: list[Record] = []  # the open one
        self._block_used = self._block_values = 0
        self._sealed = 0
        self._shard = self._next_shard()
        self._durable = self._shard.tables.records

    @property
    def durable(self) -> int:
        """How many records are in complete blocks, sealed or not."""
        return self._durable  # one number, which the writer's thread counts up while others read it

    @property
    def pending(self) -> list[Record]:
        """The records that are in no block yet."""
        return [*self._block, *self._waiting]

    def push(self, record: Record) -> None:
        """Queue a record, which ``advance`` will write."""
        self._waiting.append(record)
        self._waiting_rows += len(record.labels)

    def advance(self, *, final: bool = False) -> None:
        """Write the blocks and seal the shards that are full; with ``final`` also the last ones, however small."""
        if self._learning:
            if not final and self._waiting_rows < self._codec.learn_rows:
                return
            self._learn()
        self._settle()  # what failed the last time
        while self._waiting:
            self._fill(self._waiting.popleft())
            self._settle()
        if final:
            self._write_block()
            self._seal()

    def park(self) -> None:
        """Store the records that are in no block yet in the journal, for the next writer of this name."""
        pending = self.pending
        if len(pending) > len(self._noted):
            self._publish_assets()
            self._shard.park(pending)
            self._noted[:] = pending

    def close(self) -> None:
        """Close the shard's file and leave everything on disk as it is."""
        self._shard.close()

    @property
    def empty(self) -> bool:
        """Whether nothing is left on disk but sealed shards."""
        return not self._shard.tables.records and not self.pending

    def _learn(self) -> None:
        rows = [record.labels for record in self._waiting if len(record.labels)]
        if rows:
            self._codec.use_model(self._codec.learn(SoftLabels.cat(rows)))
        self._learning = False

    def _fill(self, record: Record) -> None:
        self._waiting_rows -= len(record.labels)
        self._block.append(record)
        self._block_used += max(1, len(record.labels))
        self._block_values += record.labels.values.numel()

    def _settle(self) -> None:
        if self._block_used >= self._block_rows or self._block_values >= MAX_BLOCK_VALUES:
            self._write_block()
        if self._shard.tables.nbytes >= self._shard_bytes:
            self._seal()

    def _write_block(self) -> None:
        if self._block:
            self._publish_assets()
            self._shard.use_model(self._codec.model)
            rows = [record.labels for record in self._block if len(record.labels)]
            self._shard.append(self._block, self._codec.encode(SoftLabels.cat(rows)) if rows else b"")
            self._durable += len(self._block)
            del self._noted[: len(self._block)]
            self._block, self._block_used, self._block_values = [], 0, 0

    def _seal(self) -> None:
        if self._shard.tables.records:
            self._shard.seal(self._storage)
            self._sealed += 1
            self._shard = self._next_shard()

    def _next_shard(self) -> Unfinished:
        shard = self._start(self._sealed)
        shard.carried = self._noted  # the same list: what is noted for the shard before stays noted for this one
        return shard

    def _publish_assets(self) -> None:
        if not self._assets_there:
            for name, data in self._codec.assets().items():
                if not self._storage.exists(name):
                    self._storage.publish(name, [data])
            self._assets_there = True
