"""The shard being written: a ``.part`` file that grows block by block, and the journal that tells what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._atomic import with_filename
from kdfast._C import crc32c
from kdfast.cache.errors import CacheError
from kdfast.cache.format.container import OPTIONAL, pack, reserve
from kdfast.cache.format.meta import HASH
from kdfast.cache.format.shard import ONE_ROW_EACH
from kdfast.cache.format.storage import Storage
from kdfast.cache.write.journal import Journal, write_at
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
        self._journal = journal
        self._announced = False  # whether the journal speaks of this shard
        self._reserved = 0
        self._descriptor = -1  # of the part, open

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
        labels = _labels_to_tensors(SoftLabels.cat([record.labels for record in records]))
        self._journal.append(PARKED, {**_tensors(RecordColumns.of(records)), **labels})

    def seal(self, storage: Storage) -> None:
        """Complete the file and move it to its name in ``storage``. The journal then no longer matters."""
        before, after = self._ends()
        end = self._reserved + self.tables.payload_bytes
        with with_filename(self.path):
            write_at(self._descriptor, after, end)
            os.ftruncate(self._descriptor, end + len(after))
            write_at(self._descriptor, before, 0)
            os.fsync(self._descriptor)
        storage.deliver(self.path, self.name)
        self.close()

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
        if not self._announced:
            self._journal.cut(0)
            text = json.dumps({"version": VERSION, "name": self.name, "metadata": self.metadata}).encode()
            self._journal.append(SHARD, {"shard": _tensor(np.frombuffer(text, np.uint8))})
            self._announced = True

    def _create(self) -> None:
        """Start the part file with spaces where the header will be, as many as it can take."""
        reserved = reserve({**self.metadata, **LARGEST_MARK}, OPTIONAL)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with with_filename(self.path):
                write_at(descriptor, b" " * reserved, 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._reserved = descriptor, reserved

    def _ends(self) -> tuple[bytes, bytes]:
        keys = self.metadata.get("keys", HASH)
        metadata, tables = {**self.metadata, **self.tables.metadata(keys)}, self.tables.arrays(self.model, keys)
        before, after = pack(metadata, self.tables.payload_bytes, tables, self._reserved)
        assert len(before) == self._reserved, "the header outgrew its place"
        return before, after

    # ---- resuming ------------------------------------------------------------------------------------------------

    @classmethod
    def restore(cls, folder: Path, journal: Journal) -> tuple[Unfinished, list[Record]] | None:
        """Resume the shard of ``journal``: the shard up to its last good block, and the records parked after it.

        None if the journal is empty. What comes after the last good block is cut off.

        Raises:
            CacheError: the journal is of another version.
            OSError: part or journal cannot be read or cut.
        """
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
                parked = _columns(contents).records(_labels_from_tensors(contents))
            elif shard._has(contents):
                columns = _columns(contents)
                shard.tables.add(columns, *contents["block"].tolist()[:2])
                parked = parked[len(columns.keys) :]  # records go into blocks in the order they were parked
            else:
                break
            kept = end
        if shard is not None:
            journal.cut(kept)
        return None if shard is None else (shard, parked)

    @classmethod
    def _announced_in(cls, folder: Path, journal: Journal, text: Tensor) -> Unfinished:
        shard = json.loads(text.numpy().tobytes())
        if shard["version"] != VERSION:
            raise CacheError(f"{journal.path} has version {shard['version']}, this kdfast continues {VERSION}")
        unfinished = cls(folder, shard["name"], shard["metadata"], journal)
        unfinished._announced = True
        if unfinished.path.exists():
            unfinished._descriptor = os.open(unfinished.path, os.O_RDWR)
        return unfinished

    def _has(self, contents: dict[str, Tensor]) -> bool:
        """Whether the part file holds the block of this journal entry, whole."""
        length, crc, self._reserved = contents["block"].tolist()
        if self._descriptor < 0:
            return False
        with with_filename(self.path), open(self._descriptor, "rb", closefd=False) as file:
            file.seek(self._reserved + self.tables.payload_bytes)
            block = file.read(length)
        return len(block) == length and crc32c(block) == crc


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array))


def _tensors(columns: RecordColumns) -> dict[str, Tensor]:
    return {f"records.{name}": _tensor(array) for name, array in columns.arrays().items()}


def _columns(contents: dict[str, Tensor]) -> RecordColumns:
    return RecordColumns(**{name[8:]: part.numpy() for name, part in contents.items() if name.startswith("records.")})


def _labels_to_tensors(labels: SoftLabels) -> dict[str, Tensor]:
    """Every field of ``labels`` by name: tensors as they are, the others together as JSON."""
    values = labels.to_fields()
    tensors = {name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    text = json.dumps({name: value for name, value in values.items() if name not in tensors}).encode()
    return {f"labels.{name}": part for name, part in {**tensors, "": _tensor(np.frombuffer(text, np.uint8))}.items()}


def _labels_from_tensors(contents: dict[str, Tensor]) -> SoftLabels:
    tensors = {name[7:]: part for name, part in contents.items() if name.startswith("labels.")}
    values = json.loads(tensors.pop("").numpy().tobytes())
    values["temperatures"] = tuple(values["temperatures"])
    return SoftLabels.from_fields({**values, **tensors})
