"""The shard being written: a ``.part`` file that grows block by block, and the journal that tells what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._atomic import part_of, with_filename
from kdfast._C import crc32c
from kdfast.cache.codecs import find
from kdfast.cache.errors import CacheCorruptError, CacheError
from kdfast.cache.format.container import OPTIONAL, pack, reserve
from kdfast.cache.format.floor import LARGEST_FLOOR
from kdfast.cache.format.meta import HASH
from kdfast.cache.format.shard import ONE_ROW_EACH
from kdfast.cache.format.storage import Storage
from kdfast.cache.write.journal import Entry, Journal, open_own, write_at
from kdfast.cache.write.records import Record, RecordColumns, Tables
from kdfast.labels import SoftLabels

__all__ = ["Unfinished", "shard_name"]

# What an entry of the journal is about.
SHARD, MODEL, BLOCK, PARKED = "SMBP"
VERSION = 1
LARGEST_MARK = {
    "targets": json.dumps({"cross_entropy_sum": -2.2250738585072014e-308, "count": 2**63}),
    "first_record": str(2**63),
    **ONE_ROW_EACH,
}


def shard_name(writer: str, number: int) -> str:
    """The file name of the shard ``number`` of ``writer``."""
    return f"shard-{writer}-{number:05d}.safetensors"


class Unfinished:
    """One shard while it is written, from its first block to its seal.

    Every method that fails leaves things so that calling it again is right: where the next bytes go is known from the
    tables, which change only after the bytes are there.

    Args:
        folder: where the part file lies, on this machine.
        name: the shard's file name.
        metadata: the shard's, without the entries that its records add.
        journal: the writer's, which has no entry of this shard yet. It is not closed here.
    """

    def __init__(self, folder: Path, name: str, metadata: dict[str, str], journal: Journal) -> None:
        self.name, self.metadata = name, metadata
        self.path = folder / f"{name}.part"
        self.tables = Tables()
        self.model = b""
        self.carried: list[Record] = []  # in no block, but noted for the shard before: to be noted for this one too
        self._journal = journal
        self._announced = False  # whether the journal speaks of this shard
        self._reserved = 0
        self._descriptor = -1  # of the part, open
        self._unsynced = False  # a sync of the part has failed
        self._copy: Path | None = None  # the whole shard, if it could not be completed in its place

    # ---- writing --------------------------------------------------------------------------------------------------

    def use_model(self, model: bytes) -> None:
        """Note in the journal that blocks are encoded with ``model`` from now on."""
        self._announce()
        if model and not self.model:
            self._journal.append(MODEL, {"model": _tensor(np.frombuffer(model, np.uint8))})
        self.model = model

    def append(self, records: Sequence[Record], block: bytes) -> None:
        """Add a block and the records it holds. When this returns a kill no longer loses them."""
        columns = RecordColumns.of(records)
        self._announce()
        if self._descriptor < 0:
            self._create()
        with with_filename(self.path):
            write_at(self._descriptor, block, self._reserved + self.tables.payload_bytes)
        crc = crc32c(block)
        place = {"block": torch.tensor([len(block), crc, self._reserved])}
        self._journal.append(BLOCK, {**_tensors(columns), **place})
        self.tables.add(columns, len(block), crc)

    def park(self, records: Sequence[Record]) -> None:
        """Store records that are in no block yet in the journal, with their labels."""
        self._announce()
        self._journal.append(*_parked(records))

    def seal(self, storage: Storage) -> None:
        """Complete the file and move it to its name in ``storage``. The journal then no longer matters.

        Raises:
            OSError: it could not be written, or not synced.
            CacheCorruptError: the part file does not hold the blocks any more.
        """
        before, after = self._ends()
        # The system drops what it could not sync, and says so once: a second sync of the same file proves nothing.
        if len(before) != self._reserved or self._unsynced:
            self._copy = self._copy or self._complete_copy()
        else:
            self._complete(before, after)
        storage.deliver(self._copy or self.path, self.name)
        if self._copy is not None:
            self.path.unlink(missing_ok=True)
        self.close()

    def _complete(self, before: bytes, after: bytes) -> None:
        end = self._reserved + self.tables.payload_bytes
        with with_filename(self.path):
            write_at(self._descriptor, after, end)
            os.ftruncate(self._descriptor, end + len(after))
            write_at(self._descriptor, before, 0)
            try:
                os.fsync(self._descriptor)
            except OSError:
                self._unsynced = True
                raise

    def _complete_copy(self) -> Path:
        """Write the whole shard to another file, as it would be if nothing had happened, and return its path."""
        reserved = self._room()
        before, after = self._ends(reserved)
        if len(before) != reserved:
            raise CacheError(f"{self.path}: its header takes {len(before)} bytes, and there is room for {reserved}")
        copy = part_of(self.path.with_name(self.name))
        try:
            with with_filename(copy), copy.open("xb") as file:
                file.write(before)
                for block in self._blocks():
                    file.write(block)
                file.write(after)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        return copy

    def _blocks(self) -> Iterator[bytes]:
        """Read the blocks that are in the part. Raises ``CacheCorruptError`` for one that is not what was written."""
        with with_filename(self.path), open(self._descriptor, "rb", closefd=False) as file:
            file.seek(self._reserved)
            for number, (length, crc) in enumerate(self.tables.blocks()):
                block = file.read(length)
                if len(block) != length or crc32c(block) != crc:
                    raise CacheCorruptError(f"{self.path}: block {number} is not what was written")
                yield block

    def close(self) -> None:
        """Close the part file and leave it as it is. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Remove the part file, whose records have been sealed."""
        self.close()
        self.path.unlink(missing_ok=True)

    def __del__(self) -> None:
        self.close()

    def _announce(self) -> None:
        if self._announced:
            return
        text = json.dumps({"version": VERSION, "name": self.name, "metadata": self.metadata}).encode()
        entry: Entry = (SHARD, {"shard": _tensor(np.frombuffer(text, np.uint8))})
        if self.carried:
            self._journal.start_over([entry, _parked(self.carried)])
        else:
            self._journal.cut(0)
            self._journal.append(*entry)
        self._announced = True

    def _create(self) -> None:
        """Start the part file with spaces where the header will be, as many as it can take."""
        reserved = self._room()
        self.path.unlink(missing_ok=True)  # what lies there is nobody's, and might be a link
        descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with with_filename(self.path):
                write_at(descriptor, b" " * reserved, 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._reserved = descriptor, reserved

    def _room(self) -> int:
        floor = {} if find(self.metadata["codec"]).drawn else LARGEST_FLOOR
        return reserve({**self.metadata, **LARGEST_MARK, **floor}, OPTIONAL)

    def _ends(self, reserved: int | None = None) -> tuple[bytes, bytes]:
        keys = self.metadata.get("keys", HASH)
        metadata, tables = {**self.metadata, **self.tables.metadata(keys)}, self.tables.arrays(self.model, keys)
        return pack(metadata, self.tables.payload_bytes, tables, self._reserved if reserved is None else reserved)

    # ---- resuming ------------------------------------------------------------------------------------------------

    @classmethod
    def restore(cls, folder: Path, journal: Journal) -> tuple[Unfinished, list[Record]] | None:
        """Resume the shard of ``journal``: the shard up to its last good block, and the records parked after it.

        None if the journal is empty. What comes after the last good block is cut off.

        Raises:
            CacheError: the journal is of another version; or the part is a link.
            OSError: part or journal cannot be read or cut.
            Exception: of any class: the journal says what no writer writes.
        """
        shard, parked, kept = cls._replay(folder, journal)
        if shard is None:
            return None
        journal.cut(kept)
        if not shard.tables.records:  # of the part no block: it is started again
            shard.close()
        return shard, parked

    @classmethod
    def _replay(cls, folder: Path, journal: Journal) -> tuple[Unfinished | None, list[Record], int]:
        """The shard, the parked records, and how much of the journal is about them."""
        shard: Unfinished | None = None
        parked: list[Record] = []
        kept = 0
        for kind, contents, end in journal.entries():
            if kind == SHARD and shard is None:
                shard = cls._announced_in(folder, journal, contents["shard"])
            elif shard is None or kind not in (MODEL, BLOCK, PARKED):
                raise CacheError(f"{journal.path} cannot be continued: it has an entry of kind {kind!r}")
            elif kind == MODEL:
                shard.model = contents["model"].numpy().tobytes()
            elif kind == PARKED:
                parked = _parked_records(contents)
            elif shard._has(contents):
                columns = _columns(contents)
                if shard.tables.records and columns.attachments != shard.tables.attachments:
                    raise ValueError("some of its records have targets or views, and others have none")
                shard.tables.add(columns, *contents["block"].tolist()[:2])
                parked = parked[len(columns.keys) :]  # records go into blocks in the order they were parked
            else:
                break
            kept = end
        return shard, parked, kept

    @classmethod
    def _announced_in(cls, folder: Path, journal: Journal, text: Tensor) -> Unfinished:
        shard = json.loads(text.numpy().tobytes())
        if shard["version"] != VERSION:
            raise CacheError(f"{journal.path} has version {shard['version']}, this kdfast continues {VERSION}")
        unfinished = cls(folder, shard["name"], shard["metadata"], journal)
        unfinished._announced = True
        if Path(unfinished.name).name != unfinished.name:
            raise CacheError(f"{journal.path} tells of {unfinished.name!r}, which is not a shard")
        if os.path.lexists(unfinished.path):
            unfinished._descriptor = open_own(unfinished.path, os.O_RDWR)
        return unfinished

    def _has(self, contents: dict[str, Tensor]) -> bool:
        """Whether the part file holds the block of this journal entry, whole."""
        length, crc, reserved = contents["block"].tolist()
        if self._descriptor < 0:
            return False
        with with_filename(self.path), open(self._descriptor, "rb", closefd=False) as file:
            file.seek(reserved + self.tables.payload_bytes)
            block = file.read(length)
        if len(block) != length or crc32c(block) != crc:
            return False
        self._reserved = reserved
        return True


def _parked(records: Sequence[Record]) -> Entry:
    """The entry that notes ``records``, which are in no block yet, with their labels."""
    labels = _labels_to_tensors(SoftLabels.cat([record.labels for record in records]))
    return PARKED, {**_tensors(RecordColumns.of(records)), **labels}


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array))


def _tensors(columns: RecordColumns) -> dict[str, Tensor]:
    return {f"records.{name}": _tensor(array) for name, array in columns.arrays().items()}


def _columns(contents: dict[str, Tensor]) -> RecordColumns:
    parts = {name[8:]: part.numpy() for name, part in contents.items() if name.startswith("records.")}
    columns = RecordColumns(**parts)
    columns.check()
    return columns


def _parked_records(contents: dict[str, Tensor]) -> list[Record]:
    columns, labels = _columns(contents), _labels_from_tensors(contents)
    if len(labels) != int(columns.rows.sum()):
        raise ValueError(f"its parked labels are {len(labels)} rows for {int(columns.rows.sum())}")
    return columns.records(labels)


def _labels_to_tensors(labels: SoftLabels) -> dict[str, Tensor]:
    """Every field of ``labels`` by name: tensors as they are, the others together as JSON."""
    values = labels.to_fields()
    del values["floor"]  # of the labels of a cache: a writer's are on their way there
    tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    text = json.dumps({name: value for name, value in values.items() if name not in tensors}).encode()
    return {f"labels.{name}": part for name, part in {**tensors, "": _tensor(np.frombuffer(text, np.uint8))}.items()}


def _labels_from_tensors(contents: dict[str, Tensor]) -> SoftLabels:
    tensors = {name[7:]: part for name, part in contents.items() if name.startswith("labels.")}
    values = json.loads(tensors.pop("").numpy().tobytes())
    values["temperatures"] = tuple(values["temperatures"])
    return SoftLabels.from_fields({**values, **tensors})
