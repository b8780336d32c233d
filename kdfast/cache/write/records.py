"""A writer's records: checked when a caller hands them in, then queued, then tables of the shard that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import Codec
from kdfast.cache.format.floor import FloorSums
from kdfast.cache.format.keys import DIGEST_BYTES, Key, number_of
from kdfast.cache.format.meta import RANGE
from kdfast.cache.format.shard import MAX_ROWS, ONE_ROW_EACH
from kdfast.cache.format.targets import Targets
from kdfast.cache.format.view import VIEW_BYTES, View, pack_views
from kdfast.labels import Hidden, SoftLabels

__all__ = [
    "Attachments",
    "Record",
    "RecordColumns",
    "Tables",
    "check_labels",
    "check_logits",
    "check_views",
    "require_same_space",
    "select",
]

COLUMN_DTYPES = {
    "keys": np.uint8,
    "rows": np.int64,
    "target_crc": np.int64,
    "cross_entropy": np.float64,
    "target_count": np.int64,
    "views": np.uint8,
    "floor": np.float64,
}


@dataclass(frozen=True)
class Record:
    """One record, ready to be encoded."""

    key: Key
    labels: SoftLabels
    targets: Targets | None = None
    views: NDArray[np.uint8] | None = None  # (rows, 13)
    floor: FloorSums | None = None  # of the rows that were measured; None: none was


class Attachments(NamedTuple):
    """What records have beside their labels: all records of a shard, or none of them."""

    targets: bool
    views: bool

    @classmethod
    def of(cls, record: Record) -> Attachments:
        return cls(record.targets is not None, record.views is not None)


@dataclass(frozen=True)
class RecordColumns:
    """Keys, row counts, targets, views and floors of some records, concatenated: what journals and tables hold."""

    keys: NDArray[np.uint8]  # (records, 16)
    rows: NDArray[np.int64]  # (records,)
    target_crc: NDArray[np.int64] | None = None  # (records,)
    cross_entropy: NDArray[np.float64] | None = None  # (records,) sums
    target_count: NDArray[np.int64] | None = None  # (records,)
    views: NDArray[np.uint8] | None = None  # (sum of rows, 13)
    floor: NDArray[np.float64] | None = None  # (records, 9), zeros where no row was measured; None: nowhere

    @classmethod
    def of(cls, records: Sequence[Record]) -> RecordColumns:
        keys = np.frombuffer(b"".join(record.key for record in records), np.uint8).reshape(-1, DIGEST_BYTES)
        rows = np.array([len(record.labels) for record in records], np.int64)
        marks = [record.targets for record in records if record.targets is not None]
        views = [record.views for record in records if record.views is not None]
        floor = None
        if any(record.floor is not None for record in records):
            floor = np.stack([(record.floor or FloorSums()).columns() for record in records])
        columns = cls(keys, rows, views=np.concatenate(views) if views else None, floor=floor)
        if not marks:
            return columns
        crc, loss, count = zip(*marks, strict=True)
        return cls(keys, rows, np.array(crc), np.array(loss, np.float64), np.array(count), columns.views, floor)

    def check(self) -> None:
        """Raise ``ValueError`` unless they are columns that ``of`` makes: what a journal holds may be anything."""
        records = len(self.rows)
        shapes: dict[str, tuple[int | None, ...]] = {"keys": (records, DIGEST_BYTES), "views": (None, VIEW_BYTES)}
        shapes["floor"] = (records, len(FloorSums().columns()))
        for name, array in self.arrays().items():
            wanted, dtype = shapes.get(name, (records,)), COLUMN_DTYPES[name]
            if array.dtype != dtype or wanted[1:] != array.shape[1:] or wanted[0] not in (None, len(array)):
                raise ValueError(f"its {name} are {array.dtype} {array.shape}")
        if not records or int(self.rows.min()) < 0 or int(self.rows.max()) > MAX_ROWS:
            raise ValueError("its records have impossible numbers of rows")
        if self.views is not None and len(self.views) != int(self.rows.sum()):
            raise ValueError(f"its views are {len(self.views)} for {int(self.rows.sum())} rows")
        marks = (self.target_crc, self.cross_entropy, self.target_count)
        if any((mark is None) != (marks[0] is None) for mark in marks):
            raise ValueError("its targets lack a column")
        if self.target_count is not None and ((self.target_count < 0) | (self.target_count > self.rows)).any():
            raise ValueError("its targets are more than its rows")
        if self.cross_entropy is not None and not np.isfinite(self.cross_entropy).all():
            raise ValueError("its cross-entropies are not finite")
        if self.floor is not None and not (np.isfinite(self.floor) & (self.floor >= 0)).all():
            raise ValueError("its floors are not sums of some")

    @property
    def attachments(self) -> Attachments:
        """What the records have beside their labels."""
        return Attachments(self.target_crc is not None, self.views is not None)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The columns that are not None, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    def records(self, labels: SoftLabels) -> list[Record]:
        """The records again, as ``of`` took them. ``labels`` are those of all records, concatenated."""
        ends = self.rows.cumsum().tolist()
        result = []
        for at, (end, rows) in enumerate(zip(ends, self.rows.tolist(), strict=True)):
            marks = None
            if self.target_crc is not None and self.cross_entropy is not None and self.target_count is not None:
                marks = Targets(int(self.target_crc[at]), float(self.cross_entropy[at]), int(self.target_count[at]))
            views = None if self.views is None else self.views[end - rows : end]
            floor = None if self.floor is None or not self.floor[at, 0] else FloorSums.of_columns(self.floor[at])
            result.append(Record(Key(self.keys[at].tobytes()), labels[end - rows : end], marks, views, floor))
        return result


class Tables:
    """The tables of a shard being written: about 36 bytes per record, and 13 per row that has a view."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, int, int, int]] = []
        self._crc: list[int] = []
        self._columns: list[RecordColumns] = []
        self.payload_bytes = self.rows = self.records = self._target_count = 0
        self._cross_entropy = 0.0
        self.floor: FloorSums | None = None  # of the records that have one

    def add(self, columns: RecordColumns, length: int, crc: int) -> None:
        """Add the records of a block of ``length`` bytes, which is 0 if none of them has a row."""
        rows = int(columns.rows.sum())
        if rows:
            self._blocks.append((self.payload_bytes, length, self.rows, rows))
            self._crc.append(crc)
        self._columns.append(columns)
        self.payload_bytes += length
        self.rows += rows
        self.records += len(columns.keys)
        if columns.cross_entropy is not None and columns.target_count is not None:
            for value in columns.cross_entropy.tolist():  # one by one: the sum does not depend on where blocks end
                self._cross_entropy += value
            self._target_count += int(columns.target_count.sum())
        if columns.floor is not None:
            measured = map(FloorSums.of_columns, columns.floor[columns.floor[:, 0] > 0])
            self.floor = FloorSums.total([self.floor, *measured])

    @property
    def nbytes(self) -> int:
        """The approximate size of the shard's file so far."""
        return self.payload_bytes + 32 * self.records  # a key and a span

    def blocks(self) -> Iterable[tuple[int, int]]:
        """Length and CRC of each block, in order."""
        return [(length, crc) for (_, length, _, _), crc in zip(self._blocks, self._crc, strict=True)]

    def keys(self) -> Iterable[Key]:
        """The records' keys, in order."""
        for columns in self._columns:
            yield from (Key(row.tobytes()) for row in columns.keys)

    def target_crcs(self) -> Iterable[tuple[Key, int | None]]:
        """Each record's key and the checksum of its targets, None where it has none."""
        for columns in self._columns:
            crcs = [None] * len(columns.keys) if columns.target_crc is None else columns.target_crc.tolist()
            yield from zip((Key(row.tobytes()) for row in columns.keys), crcs, strict=True)

    def arrays(self, model: bytes, keys: str) -> dict[str, NDArray[Any]]:
        """The tables as a shard stores them, without consecutive keys and without spans of one row each."""
        rows = self._column("rows", np.int64)
        spans = np.stack([rows.cumsum() - rows, rows], 1)
        digests = self._column("keys", np.uint8).reshape(-1, DIGEST_BYTES)
        tables: dict[str, NDArray[Any]] = {
            "block_index": np.array(self._blocks, np.int64).reshape(-1, 4),
            "record_spans": spans[:0] if self._one_row_each() else spans,
            "record_keys": digests[:0] if keys == RANGE else digests,
            "block_crc": np.array(self._crc, np.uint32),
        }
        if self.attachments.targets:
            tables["record_targets"] = self._column("target_crc", np.int64).astype(np.uint32)
        if self.attachments.views:
            tables["row_views"] = self._column("views", np.uint8).reshape(-1, VIEW_BYTES)
        if model:
            tables["codec_model"] = np.frombuffer(model, np.uint8)
        return tables

    def metadata(self, keys: str) -> dict[str, str]:
        """The entries that the records add to the shard's metadata."""
        metadata = dict(ONE_ROW_EACH) if self._one_row_each() else {}
        if keys == RANGE:
            metadata["first_record"] = str(number_of(next(iter(self.keys()))))
        if self.attachments.targets:
            targets = {"cross_entropy_sum": self._cross_entropy, "count": self._target_count}
            metadata["targets"] = json.dumps(targets)
        return metadata if self.floor is None else {**metadata, **self.floor.to_metadata()}

    @property
    def attachments(self) -> Attachments:
        """What the shard's records have beside their labels."""
        return self._columns[0].attachments if self._columns else Attachments(False, False)

    def _one_row_each(self) -> bool:
        return all((columns.rows == 1).all() for columns in self._columns)

    def _column(self, name: str, dtype: type) -> NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *(getattr(part, name).reshape(-1) for part in self._columns)])


# ---- what a caller hands in -----------------------------------------------------------------------------------------


def check_logits(logits: Tensor, codec: Codec, width: int) -> Tensor:
    """(rows, width) ``logits`` cut to the columns that ``codec`` takes. Raises for a row that cannot be stored."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{codec.input_name} must be a floating-point tensor, got {got}")
    rows = logits[None] if logits.dim() == 1 else logits
    if rows.dim() != 2 or rows.shape[1] != width:
        wanted = f"(rows, {width}) or ({width},)"
        raise ValueError(f"{codec.input_name} must be {wanted}, got {tuple(logits.shape)}")
    rows = rows.detach()[:, : codec.input_width]
    # The maximum is NaN or +inf if any column is, and -inf if no column is finite.
    largest = rows.amax(1)
    for row in (~largest.isfinite()).nonzero().flatten().tolist()[:1]:
        value = float(largest[row])
        problem = "no finite value" if value == -torch.inf else f"a value of {value}"
        raise ValueError(f"row {row} has {problem}")
    return rows


def select(codec: Codec, logits: Tensor, key: bytes) -> SoftLabels:
    """The labels that ``codec`` selects, on the CPU, sharing no memory with ``logits``, which a teacher may reuse."""
    labels = codec.select(logits, key).to("cpu")
    if labels.values.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
        return _copy(labels)
    return labels


def check_labels(labels: SoftLabels, codec: Codec) -> SoftLabels:
    """A copy of ``labels``. Raises ``TypeError`` or ``ValueError`` unless ``codec`` can store them as they are."""
    if not isinstance(labels, SoftLabels):
        raise TypeError(f"labels must be SoftLabels, got {type(labels).__name__}")
    require_same_space(labels, codec)
    if isinstance(labels, Hidden) and labels.head is not None:
        head = codec.config().get("head")
        if head is not None and labels.head.fingerprint != head:
            raise ValueError(
                f"the hidden states are for the head {head}, but these labels' head is {labels.head.fingerprint}"
            )
    if labels.present is not None and not bool(labels.present.all()):
        raise ValueError("labels must have all rows present: a cache holds no absent ones")
    copy = _copy(labels.to("cpu").without_padding())
    if len(copy):
        codec.check(copy)  # here it can be refused by name, in the background it would stop everything
    return copy


def require_same_space(labels: SoftLabels, codec: Codec) -> None:
    """Raise ``ValueError`` unless ``labels`` are of the kind, vocabulary and temperatures that ``codec`` stores."""
    for name in ("kind", "vocab_size", "temperatures"):
        ours, theirs = getattr(codec.empty, name), getattr(labels, name)
        if ours != theirs:
            raise ValueError(f"codec {codec.name!r} stores labels of {name} {ours!r}, got {theirs!r}")


def check_views(views: Sequence[View], rows: int) -> NDArray[np.uint8]:
    """(rows, 13) uint8: ``views`` as a shard stores them. Raises unless there is one ``View`` per row."""
    views = list(views)
    for view in views:
        if not isinstance(view, View):
            raise TypeError(f"views must be kdfast.cache.View, got {type(view).__name__}")
    if len(views) != rows:
        raise ValueError(f"views must be one per row, {rows}, got {len(views)}")
    return pack_views(views)


def _copy(labels: SoftLabels) -> SoftLabels:
    """``labels`` in memory of their own. Hidden ones lose their head: a cache stores none, its reader is given it."""
    copy = replace(labels.map_tensors(lambda part: part.detach().clone()), floor=None)
    return replace(copy, head=None) if isinstance(copy, Hidden) else copy
