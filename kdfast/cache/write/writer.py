"""``Writer``: teacher logits in, shards out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral
from types import TracebackType
from typing import Any

from torch import Tensor

from kdfast.cache import codecs
from kdfast.cache.errors import CacheError
from kdfast.cache.format.keys import Key, describe, make_key, number_key, number_of
from kdfast.cache.format.meta import HASH, RANGE, CacheMeta
from kdfast.cache.format.sealed import write_manifest
from kdfast.cache.format.shard import MAX_FIRST
from kdfast.cache.format.storage import open_storage
from kdfast.cache.format.targets import Targets, cross_entropy, targets_crc, targets_of
from kdfast.cache.format.view import View
from kdfast.cache.write.builder import BLOCK_ROWS, SHARD_BYTES
from kdfast.cache.write.records import Attachments, Record, check_labels, check_logits, check_views, select
from kdfast.cache.write.session import Session, work_folder
from kdfast.cache.write.writer_thread import WriterThread
from kdfast.labels import SoftLabels
from kdfast.models import look_like_probabilities

__all__ = ["Writer"]

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
    model gathers the rows to learn from, those. Leaving the ``with`` block by an exception loses none: records in no
    block yet are noted in the journal. ``kdfast.cache.salvage`` seals what no writer will resume. A power cut may
    take the blocks that the system has not written out yet; sealed shards are synced.

    What is on disk depends on the records and their order alone, never on time.

    Memory: the open block, at most 8 blocks of selected labels that wait, the tables of one shard, and about 100 bytes
    per record for its key.

    Args:
        path: the cache's directory, made if need be, or a URL that fsspec knows.
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
        self._unsettled, self._probabilities = (
            self._takes_logits,
            0,
        )  # whether these are logits; entries that may not be
        self.records = self.rows = self.duplicates = 0
        self._closed = False
        self._process = os.getpid()
        self._storage = open_storage(path)
        self._storage.create()
        meta = CacheMeta.of(self._codec, teacher, keys)
        self._make_key = make_key if keys == HASH else _number_key
        self._session = Session(self._storage, work_folder(self._storage, staging), writer, meta)
        self._seen = self._session.keys()
        # With keys="range": the last record of the shard to resume.
        self._last = self._session.last_key if keys == RANGE else None
        try:
            self._builder = self._session.builder(self._codec, block_rows, shard_bytes)
        except BaseException:
            self._session.close(None)
            raise
        self._attachments = self._session.attachments  # of the records so far; None: there is none
        self._thread = WriterThread(self._builder, block_rows)

    def __contains__(self, key: Any) -> bool:
        """Whether ``key`` has been written, now or before: its teacher pass can be skipped."""
        return self._make_key(key) in self._seen

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
            if self._is_duplicate(digest):
                return
            marks = None
            if targets is not None:
                ids = targets_of(targets, len(rows), self._codec.vocab_size)
                known = cross_entropy(rows, ids) if self._takes_logits else (0.0, 0)
                marks = Targets(targets_crc(ids), *known)
            # Both kinds of keys give a codec that draws the same seeds.
            record = self._record(digest, select(self._codec, rows, make_key(key)), marks, views)
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
            if self._is_duplicate(digest):
                return
            marks = None
            if targets is not None:
                marks = Targets(targets_crc(targets_of(targets, len(copy), self._codec.vocab_size)), 0.0, 0)
            record = self._record(digest, copy, marks, views)
        self._put(record)

    def close(self) -> None:
        """Seal the last shard and write the manifest. After an ``OSError`` it can be called again.

        A second call after a successful one does nothing.

        Raises:
            OSError: a file could not be written; nothing is lost.
        """
        if self._closed or os.getpid() != self._process:
            return
        self._thread.drain()
        self._builder.advance(final=True)
        if self.durable_records:
            write_manifest(self._storage)
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
        for record in self._thread.stop():
            self._builder.push(record)
        try:
            self._builder.park()
        except BaseException as failure:
            lost = len(self._builder.pending)
            warnings.warn(f"{self._storage.url}: {lost} records could not be kept: {failure}", stacklevel=3)
        self._end()

    def _end(self) -> None:
        self._thread.stop()
        self._closed = True
        self._session.close(self._builder)

    def _require_open(self) -> None:
        if self._closed:
            raise CacheError(f"the writer of {self._storage.url} is closed")
        if os.getpid() != self._process:
            raise CacheError(f"the writer of {self._storage.url} belongs to process {self._process}, not to its fork")

    def _refuse_probabilities(self, rows: Tensor) -> None:
        """Raise ``ValueError`` where all that has been added so far is probabilities. One row of logits settles it."""
        if not self._unsettled:
            return
        rows = rows[:FIRST_ROWS]
        self._unsettled = look_like_probabilities(rows) or not len(rows)
        self._probabilities += rows.numel() * self._unsettled
        if self._probabilities >= SURE:
            raise ValueError(
                "the rows are probabilities (in [0, 1], with sum 1), and a cache takes logits: leave the teacher's "
                "softmax out, or give probabilities.log()"
            )

    def _is_duplicate(self, digest: bytes) -> bool:
        known = digest in self._seen
        self.duplicates += known
        return known

    def _record(self, digest: Key, labels: SoftLabels, marks: Targets | None, views: Sequence[View] | None) -> Record:
        if self._last is not None and number_of(digest) != number_of(self._last) + 1:
            raise ValueError(f"keys='range' takes consecutive integers: {number_of(self._last) + 1} comes next")
        record = Record(digest, labels, marks, None if views is None else check_views(views, len(labels)))
        attachments = Attachments.of(record)
        for name, has, had in zip(Attachments._fields, attachments, self._attachments or attachments, strict=True):
            if has != had:
                raise ValueError(f"it {'has' if has else 'lacks'} {name}, unlike the records before it")
        return record

    def _put(self, record: Record) -> None:
        self._thread.put(record)
        self._attachments = Attachments.of(record)
        self._seen.add(record.key)
        if self._make_key is _number_key:
            self._last = record.key
        self.records += 1
        self.rows += len(record.labels)


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
