"""Resume state of one writer name: its lock, next shard number, codec model, and the unsealed shard a crash left."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from kdfast.cache.codecs.base import Codec
from kdfast.cache.errors import CacheError, CacheMismatchError
from kdfast.cache.format.keys import Key
from kdfast.cache.format.manifest import SHARD_NAME
from kdfast.cache.format.meta import CacheMeta
from kdfast.cache.format.sealed import scan
from kdfast.cache.format.storage import LocalStorage, Storage, digest
from kdfast.cache.write.builder import ShardBuilder
from kdfast.cache.write.journal import Journal
from kdfast.cache.write.records import Attachments, Record
from kdfast.cache.write.unfinished import Unfinished, shard_name

__all__ = ["Session", "journal_name", "work_folder"]


def journal_name(writer: str) -> str:
    """The file name of the journal of ``writer``."""
    return f"shard-{writer}.journal"


def work_folder(storage: Storage, staging: str | os.PathLike[str] | None) -> Path:
    """The local folder where shards of the cache grow: the cache's own, or one below ``staging`` if it is remote."""
    if isinstance(storage, LocalStorage):
        if staging is not None:
            raise ValueError(f"staging is for URLs: shards of {storage.url} grow there")
        return storage.directory
    base = Path(tempfile.gettempdir()) / f"kdfast-{os.getuid()}" if staging is None else Path(staging)
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if staging is None and base.stat().st_uid != os.getuid():
        raise CacheError(f"{base} belongs to somebody else: give a staging folder")
    folder = base / digest(storage.url)
    folder.mkdir(exist_ok=True)
    return folder


class Session:
    """What the writer ``writer`` finds when it starts. The session holds the name's lock until ``close``.

    Args:
        meta: the cache that the writer is for; None to take what is there.

    Raises:
        CacheMismatchError: there is another cache.
        CacheCorruptError, OSError: as ``scan`` does.
        CacheBusyError: the name's lock is held.
        CacheError: what is left unsealed belongs to a shard that another writer has sealed.
    """

    def __init__(self, storage: Storage, folder: Path, writer: str, meta: CacheMeta | None) -> None:
        self._storage, self._folder, self._writer = storage, folder, writer
        self._journal = Journal(folder / journal_name(writer))
        try:
            self._sealed = scan(storage)
            self._own = [shard for shard in self._sealed if shard.writer == writer]
            self._unfinished, self._parked = self._restore()
            self.meta = self._require_meta(meta)
        except BaseException:
            self._journal.close(remove=self._journal.empty)
            raise

    @property
    def has_left(self) -> bool:
        """Whether an earlier session has left something unsealed."""
        return self._unfinished is not None or bool(self._parked)

    @property
    def own_records(self) -> int:
        """How many records this writer's sealed shards held when the session began."""
        return sum(len(shard.keys) for shard in self._own)

    @property
    def model(self) -> bytes:
        """The model that this writer's name has used so far, if any."""
        left = b"" if self._unfinished is None else self._unfinished.model
        return left or next((shard.model for shard in self._own if shard.model), b"")

    def keys(self) -> set[Key]:
        """The keys of every stored record, other writers' and parked ones included."""
        found = {Key(row.tobytes()) for shard in self._sealed for row in shard.keys}
        if self._unfinished is not None:
            found.update(self._unfinished.tables.keys())
        return found | {record.key for record in self._parked}

    @property
    def last_key(self) -> Key | None:
        """The key of the last record of the shard to resume, parked records included; None if it has none."""
        keys = [] if self._unfinished is None else list(self._unfinished.tables.keys())
        return self._parked[-1].key if self._parked else keys[-1] if keys else None

    @property
    def attachments(self) -> Attachments | None:
        """What the records of the shard to resume have beside their labels; None if it has no record yet."""
        if self._unfinished is not None and self._unfinished.tables.records:
            return self._unfinished.tables.attachments
        return Attachments.of(self._parked[0]) if self._parked else None

    def builder(self, codec: Codec, block_rows: int, shard_bytes: int) -> ShardBuilder:
        """The builder that resumes the writer's work with ``codec``, which is given the model."""
        for name, data in codec.assets().items():
            if self._storage.exists(name) and self._storage.read_bytes(name) != data:
                raise CacheMismatchError(f"{self._storage.describe(name)} is not the asset that codec {codec.name} has")
        if self.model:
            codec.use_model(self.model)
        return ShardBuilder(codec, self._start, self._storage, self._parked, block_rows, shard_bytes)

    def close(self, builder: ShardBuilder | None) -> None:
        """Release the lock. What ``builder`` has not sealed stays on disk for the next session."""
        if builder is not None:
            builder.close()
        self._journal.close(remove=builder is None or builder.empty)
        if not isinstance(self._storage, LocalStorage):
            with suppress(OSError):  # not empty: another writer is at work, or left something
                self._folder.rmdir()

    def _start(self, number: int) -> Unfinished:
        """The ``number``-th shard of this session, from 0."""
        if self._unfinished is not None and number == 0:
            return self._unfinished
        assert self.meta is not None
        name = shard_name(self._writer, self._first + number)
        return Unfinished(self._folder, name, self.meta.to_strings(), self._journal)

    @property
    def _first(self) -> int:
        if self._unfinished is not None:
            return _number(self._unfinished)
        return max((shard.number + 1 for shard in self._own), default=0)

    def _restore(self) -> tuple[Unfinished | None, list[Record]]:
        """The unsealed shard and the parked records of the journal, without what has been sealed after all."""
        try:
            left = Unfinished.restore(self._folder, self._journal)
            if left is not None:
                CacheMeta.from_strings(left[0].metadata)  # which is asked for later, and whose error is the journal's
        except CacheError:
            raise
        except Exception as error:  # whatever entries give that have the right checksum and are none of a writer's
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the file's beginning
                raise
            raise CacheError(f"{self._journal.path} cannot be continued: {error!r:.200}") from error
        if left is None:
            return None, []
        unfinished, parked = left
        if SHARD_NAME.fullmatch(unfinished.name) is None:
            raise CacheError(f"{self._journal.path} tells of {unfinished.name!r}, which is not a shard")
        sealed = {row.tobytes() for shard in self._own for row in shard.keys}
        if any(shard.name == unfinished.name for shard in self._own):
            # A kill between the last two steps of sealing, unless somebody else has used the name.
            if not {bytes(key) for key in unfinished.tables.keys()} <= sealed:  # noqa: SIM118
                raise CacheError(
                    f"{unfinished.path} holds records of a shard that another writer of this name has sealed: "
                    "move it and its journal away, and give each writer its own name"
                )
            unfinished.discard()
            return None, [record for record in parked if record.key not in sealed]
        if not (unfinished.tables.records or parked):
            unfinished.discard()
            return None, []
        return unfinished, parked

    def _require_meta(self, meta: CacheMeta | None) -> CacheMeta | None:
        """``meta``, or the cache's own if that is None. Raises ``CacheMismatchError`` if what is there differs."""
        there = [(shard.meta, self._storage.describe(shard.name)) for shard in self._sealed[:1]]
        if self._unfinished is not None:
            there.append((CacheMeta.from_strings(self._unfinished.metadata), str(self._unfinished.path)))
        if meta is not None:
            there.insert(0, (meta, "this writer"))
        for theirs, name in there[1:]:
            there[0][0].require_equal(theirs, there[0][1], name)
        return there[0][0] if there else None


def _number(unfinished: Unfinished) -> int:
    match = SHARD_NAME.fullmatch(unfinished.name)
    assert match is not None
    return int(match[2])
