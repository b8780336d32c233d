"""``Writer``: teacher logits in, shards out."""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from kdfast.cache import codecs
from kdfast.cache.errors import CacheError
from kdfast.cache.format.floor import FloorSums
from kdfast.cache.format.keys import Key, describe, make_key, number_key, number_of
from kdfast.cache.format.meta import HASH, RANGE, CacheMeta
from kdfast.cache.format.sealed import write_manifest
from kdfast.cache.format.shard import MAX_FIRST
from kdfast.cache.format.storage import open_storage
from kdfast.cache.format.targets import Targets, cross_entropy, targets_crc, targets_of
from kdfast.cache.format.teacher import Fingerprint
from kdfast.cache.format.view import View
from kdfast.cache.write.builder import BLOCK_ROWS, SHARD_BYTES, ShardBuilder
from kdfast.cache.write.measure import measure
from kdfast.cache.write.records import Attachments, Record, check_labels, check_logits, check_views, select
from kdfast.cache.write.session import Session, work_folder
from kdfast.cache.write.writer_thread import WriterThread
from kdfast.labels import SoftLabels
from kdfast.models import look_like_probabilities

__all__ = ["Writer", "WriterReport"]

NAMED = 5  # records that a report names


class WriterReport(NamedTuple):
    """What a writer has been given since it was opened."""

    records: int  # stored
    rows: int  # stored
    duplicates: int  # records whose key was there already: they are not stored
    conflicts: int  # of these, records whose targets are not those of the record that is there
    conflicting_keys: tuple[str, ...]  # the first of them


FIRST_ROWS = 64  # of a record, that are looked at for probabilities
SURE = 8  # so many numbers that could be probabilities are: a few single rows of logits may look like some


class Writer:
    """Writes a cache, or adds to one. Use it as a context manager.

    Leaving the ``with`` block seals the last shard and writes the manifest. Several writers may fill one directory at
    once if their ``writer`` names differ. Encoding and writing happen in a thread of their own; an error there is
    raised by the next ``add`` or ``close``.

    A writer that is killed leaves an unfinished shard, ``*.part``, and its journal. The next writer of that name
    resumes there: give it the same records in the same order, and the shards come out as if nothing had happened,
    byte for byte (``key in writer`` tells which teacher passes can be skipped). A kill loses the records of the open
    block, fewer than ``block_rows`` rows, those that wait in the queue, at most 8 blocks, and, while a codec with a
    model gathers the rows to learn from, those. Leaving the ``with`` block by an exception, a Ctrl-C at any place
    included, loses none: records in no block yet are noted in the journal. A writer that is dropped without being
    closed does the same, with a ``ResourceWarning``. ``kdfast.cache.salvage`` seals what no writer will resume. A power
    cut may take the blocks that the system has not written out yet; sealed shards are synced.

    What is on disk depends on the records and their order alone, never on time.

    Of some rows, spread over all, ``add`` measures how far their labels lie from them: ``CacheInfo.floor`` says it.

    The first writer of a directory declares in ``cache.json`` what the cache is; the others compare when they open it.

    Memory: the open block, at most 8 blocks of selected labels that wait, the tables of one shard, and about 100 bytes
    per record for its key, 130 if there are targets.

    Args:
        path: the cache's directory, made if need be, or a URL that fsspec knows. ``~`` is the home, and a relative path
            is resolved when the writer is opened.
        vocab_size: the width of the labels.
        codec: ``"topk"``, ``"dense"``, ... (see ``kdfast.cache.codecs``), or ``"auto"``: what ``codecs.choose`` says.
        temperatures: the teacher temperatures that a loss will use.
        teacher: a fingerprint of the teacher. A cache takes rows of one teacher only.
        teacher_vocab_size: the width of the logits, of which the first ``vocab_size`` columns are the teacher's
            distribution (a teacher pads its output layer, or knows more tokens at its end). ``vocab_size`` if None.
        keys: ``"hash"`` stores a digest of each key. ``"range"`` is for keys 0, 1, 2, ...: it stores none, and each
            writer is given consecutive integers, from where it likes.
        writer: this writer's name in its files' names, such as the rank: letters, digits and ``_``.
        shard_bytes: a shard is sealed after the block that brings it to this size.
        block_rows: a block is closed after the record that brings it to this many rows (one without rows counts as 1).
        staging: for a URL: the local folder where a shard grows until it is uploaded whole. By default one of the
            system's temporary folder, always the same for the same URL and user.
        options: the codec's own: ``k``, ``value_dtype``, ...

    Raises:
        CacheMismatchError: the directory holds a cache with another codec, vocabulary, temperatures or teacher.
        CacheCorruptError: the directory holds a corrupt shard.
        CacheBusyError: a writer of this name is at work there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        codec: str,
        temperatures: Sequence[float] = (1.0,),
        teacher: str = "",
        teacher_vocab_size: int | None = None,
        keys: str = HASH,
        writer: str = "0",
        shard_bytes: int = SHARD_BYTES,
        block_rows: int = BLOCK_ROWS,
        staging: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if not re.fullmatch("[A-Za-z0-9_]+", writer):
            raise ValueError(f"writer must consist of letters, digits and _, got {writer!r}")
        if keys not in (HASH, RANGE):
            raise ValueError(f"keys must be {HASH!r} or {RANGE!r}, got {keys!r}")
        if shard_bytes < 1 or block_rows < 1:
            raise ValueError(f"shard_bytes and block_rows must be positive, got {shard_bytes} and {block_rows}")
        if vocab_size == 1:
            raise ValueError("a teacher with one logit has no distribution to store: give the logits of both classes")
        self._codec = codecs.create(codec, vocab_size, temperatures, options)
        self._width = self._codec.input_width if teacher_vocab_size is None else teacher_vocab_size
        self._takes_logits = self._codec.input_name == codecs.LOGITS
        if teacher_vocab_size is not None and not self._takes_logits:
            raise ValueError(f"codec {self._codec.name!r} takes {self._codec.input_name}: it has no teacher_vocab_size")
        if self._width < self._codec.input_width:
            raise ValueError(f"teacher_vocab_size must be at least vocab_size {vocab_size}, got {teacher_vocab_size}")
        self._duplicates = self._conflicts = 0
        self._conflicting: list[str] = []
        self._may_be_probabilities = self._takes_logits
        self._probabilities = 0  # entries that may be no logits
        self._closed = False
        self._process = os.getpid()
        self._storage = open_storage(path)
        self._storage.create()
        named = Fingerprint.of(teacher)
        meta = CacheMeta.of(self._codec, str(named), keys)
        self._make_key = make_key if keys == HASH else _number_key
        self._session = Session(self._storage, work_folder(self._storage, staging), writer, meta, named)
        try:
            self._seen = self._session.target_crcs()
            # With keys="range": the last record of the shard to resume.
            self._last = self._session.last_key if keys == RANGE else None
            self._rows_before = self._session.own_rows
            self._attachments = self._session.attachments  # of the records so far; None: there is none
            self._builder = self._session.builder(self._codec, block_rows, shard_bytes)
            self._thread = WriterThread(self._builder, block_rows)
        except BaseException:
            self._session.close(None)
            raise
        self._measured: FloorSums | None = None
        self._unsettled: tuple[Record, int] | None = None  # a record that is being queued, and how many were before
        self._leaving = _Leaving(self._builder, self._session, self._storage.url, self._process)
        self._finalizer = weakref.finalize(self, _abandon, self._thread, self._leaving)

    def __contains__(self, key: Any) -> bool:
        """Whether ``key`` has been written, now or before: its teacher pass can be skipped."""
        self._settle()
        return self._make_key(key) in self._seen

    @property
    def records(self) -> int:
        """Records that this writer has stored since it was opened."""
        return self._thread.totals.records

    @property
    def rows(self) -> int:
        """Rows that this writer has stored since it was opened."""
        return self._thread.totals.rows

    @property
    def duplicates(self) -> int:
        """Records that were not stored because their key was there already."""
        return self._duplicates

    @property
    def report(self) -> WriterReport:
        """What the writer has been given since it was opened: how much is stored, and how much is not, and why."""
        return WriterReport(self.records, self.rows, self._duplicates, self._conflicts, tuple(self._conflicting))

    @property
    def measured(self) -> FloorSums | None:
        """How far the labels added since the writer was opened lie from their rows; None where none was measured."""
        self._settle()
        return self._measured

    @property
    def codec(self) -> codecs.Codec:
        """The codec that selects and encodes the labels."""
        return self._codec

    @property
    def durable_records(self) -> int:
        """Records of this writer's name, earlier sessions' included, in sealed shards and complete blocks."""
        return self._session.own_records + self._builder.durable

    def add(
        self, key: Any, logits: Tensor, *, targets: Tensor | None = None, views: Sequence[View] | None = None
    ) -> None:
        """Store one record. If ``key`` is there already the first record stays, and ``duplicates`` counts this one.

        If its targets are not those of the record that stays, two samples have one key: ``report`` counts and names it,
        and the first time there is a warning.

        Either all records of a shard have targets or none has; likewise views.

        Args:
            key: token ids (a 1-D integer tensor), or a name (str, bytes or int).
            logits: (rows, teacher_vocab_size), or (teacher_vocab_size,) for a single row; any float dtype and device.
                -inf masks. For the codec ``hidden`` hidden states, (rows, width).
            targets: (rows,) integer ids of what the rows predict, negative where there is nothing to predict. A
                checksum is kept of them, by which a student's loader can tell that it reads the same data, and the
                teacher's mean cross-entropy.
            views: what was done to each row's sample before the teacher saw it.

        Raises:
            TypeError, ValueError: a key, logits, targets or views of the wrong kind or shape.
            ValueError: a row holds NaN or +inf or no finite value, or cannot be stored within the codec's error.
                The message names key and row; the record is not added.
            OSError: a shard could not be written. This record is not added, those before it are not lost: the next
                call tries again.
        """
        self._require_open()
        digest = self._make_key(key)
        with _about(key):
            rows = check_logits(logits, self._codec, self._width)
            self._refuse_probabilities(rows)
            ids = None if targets is None else targets_of(targets, len(rows), self._codec.vocab_size)
            if self._is_duplicate(key, digest, ids):
                return
            marks = None
            if ids is not None:
                known = cross_entropy(rows, ids) if self._takes_logits else (0.0, 0)
                marks = Targets(targets_crc(ids), *known)
            # Both kinds of keys give a codec that draws the same seeds.
            labels = select(self._codec, rows, make_key(key))
            floor = measure(self._codec, rows, labels, self._rows_before + self.rows)
            record = self._record(digest, labels, marks, views, floor)
        self._put(record)

    def add_labels(
        self, key: Any, labels: SoftLabels, *, targets: Tensor | None = None, views: Sequence[View] | None = None
    ) -> None:
        """Store one record whose labels have been selected before, from another cache or by another tool.

        Args:
            labels: of the codec's kind, vocabulary and temperatures; all rows present.
            key, targets, views: as ``add`` takes them. Without logits the targets' cross-entropy is not known: they do
                not take part in the shard's.

        Raises:
            TypeError, ValueError: labels that the codec does not store, or as ``add``.
            OSError: as ``add``.
        """
        self._require_open()
        digest = self._make_key(key)
        with _about(key):
            copy = check_labels(labels, self._codec)
            ids = None if targets is None else targets_of(targets, len(copy), self._codec.vocab_size)
            if self._is_duplicate(key, digest, ids):
                return
            marks = None if ids is None else Targets(targets_crc(ids), 0.0, 0)
            record = self._record(digest, copy, marks, views)
        self._put(record)

    def skip(self, key: Any, targets: Tensor | None = None) -> None:
        """Count a record that is not stored because its key is there, as ``add`` does, without its labels.

        Args:
            key: as ``add`` takes it.
            targets: the ids that its rows predict, to be compared with those of the record that is there.

        Raises:
            KeyError: ``key`` has not been written.
            TypeError, ValueError: targets of the wrong kind.
        """
        self._require_open()
        digest = self._make_key(key)
        with _about(key):
            ids = None if targets is None else targets_of(targets, targets.numel(), self._codec.vocab_size)
            if not self._is_duplicate(key, digest, ids):
                raise KeyError(f"{describe(key)} has not been written")

    def close(self) -> None:
        """Seal the last shard and write the manifest. After an ``OSError`` it can be called again.

        A second call after a successful one does nothing.

        Raises:
            OSError: a file could not be written; nothing is lost.
        """
        if self._closed or os.getpid() != self._process:
            return
        self._thread.drain()
        self._thread.call(self._leaving.finish)
        self._end()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._leave()

    def _leave(self) -> None:
        """If it is not closed: write the blocks that are complete, and note the rest in the journal."""
        if self._closed or os.getpid() != self._process:
            return
        with suppress(BaseException):  # often the very error that is being handled
            self._thread.drain()
        try:
            self._end()
        except OSError as error:  # of a disk that fails, which is not to hide why the block was left
            warnings.warn(f"{self._storage.url}: {error}", stacklevel=3)
        if self._leaving.lost:
            warnings.warn(self._leaving.loss, stacklevel=3)

    def _end(self) -> None:
        try:
            self._thread.end(self._leaving)
        finally:
            if self._thread.ended:
                self._closed = True
                self._finalizer.detach()

    def _require_open(self) -> None:
        self._settle()
        if self._closed:
            raise CacheError(f"the writer of {self._storage.url} is closed")
        if os.getpid() != self._process:
            raise CacheError(f"the writer of {self._storage.url} belongs to process {self._process}, not to its fork")

    def _refuse_probabilities(self, rows: Tensor) -> None:
        """Raise ``ValueError`` where all that has been added so far is probabilities. One row of logits settles it."""
        if not self._may_be_probabilities:
            return
        rows = rows[:FIRST_ROWS]
        self._may_be_probabilities = look_like_probabilities(rows) or not len(rows)
        self._probabilities += rows.numel() * self._may_be_probabilities
        if self._probabilities >= SURE:
            raise ValueError(
                "the rows are probabilities (in [0, 1], with sum 1), and a cache takes logits: leave the teacher's "
                "softmax out, or give probabilities.log()"
            )

    def _is_duplicate(self, key: Any, digest: Key, targets: Tensor | None) -> bool:
        """Whether the key is there already; such a record is counted, and its targets are compared."""
        if digest not in self._seen:
            return False
        self._duplicates += 1
        there = self._seen[digest]
        if targets is not None and there is not None and targets_crc(targets) != there:
            self._conflicts += 1
            if self._conflicts <= NAMED:
                self._conflicting.append(describe(key))
            if self._conflicts == 1:
                warnings.warn(
                    f"{self._storage.url}: {describe(key)} is there already, with other targets: two samples have one "
                    "key, or the data has changed. The first record stays; Writer.report counts the others",
                    stacklevel=3,
                )
        return True

    def _record(
        self,
        digest: Key,
        labels: SoftLabels,
        marks: Targets | None,
        views: Sequence[View] | None,
        floor: FloorSums | None = None,
    ) -> Record:
        if self._last is not None and number_of(digest) != number_of(self._last) + 1:
            raise ValueError(f"keys='range' takes consecutive integers: {number_of(self._last) + 1} comes next")
        record = Record(digest, labels, marks, None if views is None else check_views(views, len(labels)), floor)
        attachments = Attachments.of(record)
        for name, has, had in zip(Attachments._fields, attachments, self._attachments or attachments, strict=True):
            if has != had:
                raise ValueError(f"it {'has' if has else 'lacks'} {name}, unlike the records before it")
        return record

    def _put(self, record: Record) -> None:
        self._unsettled = record, self.records
        self._thread.put(record)
        self._settle()

    def _settle(self) -> None:
        """Note what has been queued. An exception may have come in between: so it is known what to make up for."""
        if self._unsettled is None:
            return
        record, before = self._unsettled
        if self.records > before:
            self._attachments = Attachments.of(record)
            self._seen[record.key] = None if record.targets is None else record.targets.crc
            self._measured = FloorSums.total([self._measured, record.floor])
            if self._make_key is _number_key:
                self._last = record.key
        self._unsettled = None


@dataclass
class _Leaving:
    """What is to be done at a writer's end, in its thread, whether the writer itself is still there or not."""

    builder: ShardBuilder
    session: Session
    url: str
    process: int
    lost: int = 0
    loss: str = ""

    def finish(self) -> None:
        """Seal the last shard and write the manifest."""
        self.builder.advance(final=True)
        if self.session.own_records + self.builder.durable:
            write_manifest(self.session.storage)

    def __call__(self) -> None:
        """Note the records that are in no block yet, and release the name."""
        try:
            self.builder.park()
        except BaseException as failure:
            self.lost = len(self.builder.pending)
            self.loss = f"{self.url}: {self.lost} records could not be kept: {failure}"
        self.session.close(self.builder)


def _abandon(thread: WriterThread, leaving: _Leaving) -> None:
    """End the thread of a writer that was dropped, or that the interpreter's end finds open, and keep its records."""
    if os.getpid() != leaving.process or thread.ended:
        return
    warnings.warn(
        f"the writer of {leaving.url} was not closed: what it had is kept for the next writer of its name, or for "
        "kdfast.cache.salvage; use `with`, or close()",
        ResourceWarning,
        stacklevel=2,
    )
    try:
        thread.end(leaving)
    except OSError as error:
        warnings.warn(f"{leaving.url}: {error}", stacklevel=2)
    if leaving.lost:
        warnings.warn(leaving.loss, stacklevel=2)


def _number_key(key: Any) -> Key:
    """The key of an integer, for keys="range". Raises ``TypeError`` or ``ValueError`` for anything else."""
    if not isinstance(key, Integral) or isinstance(key, bool):
        raise TypeError(f"with keys='range' a key is an int, got {describe(key)}")
    if not 0 <= int(key) < MAX_FIRST:
        raise ValueError(f"with keys='range' a key lies in [0, 2**62), got {key}")
    return number_key(int(key))


@contextmanager
def _about(key: Any) -> Iterator[None]:
    """A context whose ``TypeError`` and ``ValueError`` name the record ``key`` that they are about."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{describe(key)}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{describe(key)}: {error}") from error
