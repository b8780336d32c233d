"""Resume state of one writer name: its lock, next shard number, codec model, and the unsealed shard a crash left."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from kdfast._paths import local_path
from kdfast.cache.codecs.base import Codec
from kdfast.cache.errors import CacheError, CacheMismatchError
from kdfast.cache.format.declared import DECLARATION, Declaration, declare, read_declaration, require_agreement
from kdfast.cache.format.keys import Key
from kdfast.cache.format.manifest import SHARD_NAME, shard_names
from kdfast.cache.format.meta import CacheMeta
from kdfast.cache.format.sealed import scan
from kdfast.cache.format.storage import LocalStorage, RemoteStorage, Storage, digest
from kdfast.cache.format.teacher import Fingerprint
from kdfast.cache.write.builder import ShardBuilder
from kdfast.cache.write.journal import Journal, is_alive
from kdfast.cache.write.records import Attachments, Record, require_same_space
from kdfast.cache.write.unfinished import Unfinished, shard_name

__all__ = ["JOURNAL_NAME", "Session", "journal_name", "work_folder"]

JOURNAL_NAME = re.compile(r"shard-([A-Za-z0-9_]+)\.journal")


def journal_name(writer: str) -> str:
    """The file name of the journal of ``writer``."""
    return f"shard-{writer}.journal"


def work_folder(storage: Storage, staging: str | os.PathLike[str] | None) -> Path:
    """The local folder where shards of the cache grow: the cache's own, or one below ``staging`` if it is remote."""
    if isinstance(storage, LocalStorage):
        if staging is not None:
            raise ValueError(f"staging is for URLs: shards of {storage.url} grow there")
        return storage.directory
    base = Path(tempfile.gettempdir()) / f"kdfast-{os.getuid()}" if staging is None else local_path(staging)
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    if staging is None and (found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode)):
        raise CacheError(f"{base} belongs to somebody else, or is a link: give a staging folder")
    folder = base / digest(storage.url)
    folder.mkdir(exist_ok=True)
    return folder


class Session:
    """What the writer ``writer`` finds when it starts. The session holds the name's lock until ``close``.

    The first writer of a cache declares what it is, before it has a shard; the others compare.

    Args:
        meta: the cache that the writer is for; None to take what is there.
        teacher: the fingerprint in ``meta``, with its parts and its older forms if they are known.

    Attributes:
        meta: the cache that is there now, which has the teacher's fingerprint in the form that it was first given in;
            None if nothing is there.

    Raises:
        CacheMismatchError: there is another cache.
        CacheCorruptError, OSError: as ``scan`` does.
        CacheBusyError: the name's lock is held.
        CacheError: what is left unsealed belongs to a shard that another writer has sealed.
    """

    def __init__(
        self, storage: Storage, folder: Path, writer: str, meta: CacheMeta | None, teacher: Fingerprint | None = None
    ) -> None:
        self._storage, self._folder, self._writer = storage, folder, writer
        self._teacher = teacher
        with _alone(folder):
            self._journal = Journal(folder / journal_name(writer))
            try:
                self._declared = read_declaration(storage)
                if meta is not None:
                    self._declare_first(meta)
            except BaseException:
                self._journal.close(remove=self._journal.empty)
                raise
        try:
            self._sealed = scan(storage, torn=self._is_torn)
            self._own = [shard for shard in self._sealed if shard.writer == writer]
            self._unfinished, self._parked = self._restore()
            self.meta = self._require_meta(meta)
            if meta is not None and self._declared is None and self.meta is not None:
                declare(storage, self._declaration(self.meta))
        except BaseException:
            self._close_journal(remove=self._journal.empty)
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
    def own_rows(self) -> int:
        """How many rows this writer's name had stored when the session began, parked ones included."""
        left = 0 if self._unfinished is None else self._unfinished.tables.rows
        return sum(shard.rows for shard in self._own) + left + sum(len(record.labels) for record in self._parked)

    @property
    def model(self) -> bytes:
        """The model that this writer's name has used so far, if any."""
        left = b"" if self._unfinished is None else self._unfinished.model
        return left or next((shard.model for shard in self._own if shard.model), b"")

    @property
    def storage(self) -> Storage:
        """Where the cache lies."""
        return self._storage

    def target_crcs(self) -> dict[Key, int | None]:
        """The checksum of the targets of every stored record by its key, other writers' and parked ones included.

        None where a record was stored without targets. Of records with equal keys the first counts.
        """
        found: dict[Key, int | None] = {record.key: _crc_of(record) for record in self._parked}
        if self._unfinished is not None:
            found.update(self._unfinished.tables.target_crcs())
        for shard in reversed(self._sealed):
            crcs = [None] * len(shard.keys) if shard.targets is None else shard.targets.tolist()
            found.update(zip((Key(row.tobytes()) for row in shard.keys[::-1]), reversed(crcs), strict=True))
        return found

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
            there = self._storage.read_bytes(name) if self._storage.exists(name) else data
            if there == data:
                continue
            if isinstance(self._storage, LocalStorage) or not data.startswith(there):
                raise CacheMismatchError(f"{self._storage.describe(name)} is not the asset that codec {codec.name} has")
            self._storage.publish(name, [data])  # an upload that broke off
        if self.model:
            codec.use_model(self.model)
        self._check_parked(codec)
        return ShardBuilder(codec, self._start, self._storage, self._parked, block_rows, shard_bytes)

    def _check_parked(self, codec: Codec) -> None:
        """Raise ``CacheError`` unless ``codec`` can store the parked records, and those of one shard are alike."""
        try:
            for record in self._parked:
                if Attachments.of(record) != self.attachments:
                    raise ValueError("some of its records have targets or views, and others have none")
                require_same_space(record.labels, codec)
                if len(record.labels) and not codec.learn_rows:  # other codecs may round what was selected elsewhere
                    codec.check(record.labels)
        except (TypeError, ValueError) as error:
            raise CacheError(f"{self._journal.path} cannot be continued: {error}") from error

    def close(self, builder: ShardBuilder | None) -> None:
        """Release the lock. What ``builder`` has not sealed stays on disk for the next session."""
        try:
            if builder is not None:
                builder.close()
        finally:
            # Without a builder nothing has been done about what was left, whatever the reason.
            self._close_journal(remove=not self.has_left if builder is None else builder.empty)
        if not isinstance(self._storage, LocalStorage):
            with suppress(OSError):  # not empty: another writer is at work, or left something
                self._folder.rmdir()

    def _close_journal(self, *, remove: bool) -> None:
        try:
            with _alone(self._folder):
                # While the name is locked, so that no writer relies on what is withdrawn.
                if remove and self._nobody_relies_on_it():
                    (self._folder / DECLARATION).unlink(missing_ok=True)  # the folder is the cache's: it is local
                self._journal.close(remove=remove)
        finally:
            self._journal.close(remove=False)  # a disk that fails must not keep the name locked

    def _start(self, number: int) -> Unfinished:
        """The ``number``-th shard of this session, from 0."""
        if self._unfinished is not None and number == 0:
            return self._unfinished
        if self.meta is None:
            raise CacheError(f"{self._storage.url}: it is not known what cache it is")
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
                _require_name(left[0], self._writer, self._journal.path)
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

    def _is_torn(self, name: str) -> bool:
        """Whether the shard ``name`` is an upload of this writer's own that broke off, and will be repeated."""
        match, part = SHARD_NAME.fullmatch(name), self._folder / f"{name}.part"
        if match is None or match[1] != self._writer:
            return False
        return isinstance(self._storage, RemoteStorage) and part.exists() and self._storage.has_part_of(part, name)

    # ---- what the cache is -----------------------------------------------------------------------------------------

    def _declare_first(self, meta: CacheMeta) -> None:
        """Declare the cache, if neither a shard nor a writer says yet what it is."""
        if not self._journal.empty or shard_names(self._storage):
            return
        if self._declared is None:
            self._declared = declare(self._storage, self._declaration(meta))
        elif self._declared.meta != meta and self._nobody_relies_on_it():
            self._declared = declare(self._storage, self._declaration(meta), replace=True)

    def _nobody_relies_on_it(self) -> bool:
        """Whether the cache holds nothing and no other writer is at work: what it was declared as does not matter.

        Of a remote cache that cannot be known.
        """
        if not isinstance(self._storage, LocalStorage) or shard_names(self._storage):
            return False
        names = [match[0] for name in self._storage.list() if (match := JOURNAL_NAME.fullmatch(name))]
        others = [self._folder / name for name in names if name != self._journal.path.name]
        return not any(path.stat().st_size or is_alive(path) for path in others)

    def _declaration(self, meta: CacheMeta) -> Declaration:
        return Declaration(meta, {} if self._teacher is None else self._teacher.parts)

    def _require_meta(self, meta: CacheMeta | None) -> CacheMeta | None:
        """``meta``, or the cache's own if that is None. Raises ``CacheMismatchError`` if what is there differs."""
        there = [(shard.meta, self._storage.describe(shard.name)) for shard in self._sealed[:1]]
        if self._unfinished is not None:
            there.append((CacheMeta.from_strings(self._unfinished.metadata), str(self._unfinished.path)))
        if self._declared is not None:
            there.append((self._declared.meta, self._storage.describe(DECLARATION)))
        if not there:
            return meta
        if meta is None:
            ours, there = there[0][0], there[1:]
        else:
            ours = self._with_known_teacher(meta, there[0][0])
        parts = {} if self._declared is None else self._declared.teacher_parts
        for theirs, where in there:
            require_agreement(self._declaration(ours), theirs, parts, where)
        return ours

    def _with_known_teacher(self, meta: CacheMeta, theirs: CacheMeta) -> CacheMeta:
        """``meta`` with the teacher's fingerprint in the form in which the cache has it, if it has an older form."""
        if self._teacher is None or meta.teacher == theirs.teacher or theirs.teacher not in self._teacher.older():
            return meta
        return replace(meta, teacher=theirs.teacher)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A context that one process at a time is in, where the file system can lock a directory."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # what is done there will say why
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for the copies that forked processes may have
        os.close(descriptor)


def _crc_of(record: Record) -> int | None:
    return None if record.targets is None else record.targets.crc


def _require_name(unfinished: Unfinished, writer: str, journal: Path) -> None:
    match = SHARD_NAME.fullmatch(unfinished.name)
    if match is None or match[1] != writer:
        raise CacheError(f"{journal} tells of {unfinished.name!r}, which is not a shard of this writer")


def _number(unfinished: Unfinished) -> int:
    match = SHARD_NAME.fullmatch(unfinished.name)
    if match is None:
        raise CacheError(f"{unfinished.path} is not a shard's")
    return int(match[2])
