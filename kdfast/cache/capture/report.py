"""``CaptureReport``: what a capture did, and the records that it met again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast.cache.capture.batches import Mark
from kdfast.cache.errors import CacheError, CacheMismatchError
from kdfast.cache.format.floor import FloorSums
from kdfast.cache.format.keys import Key, describe, make_key
from kdfast.cache.format.storage import LocalStorage, Storage
from kdfast.cache.format.targets import targets_crc
from kdfast.cache.read.reader import CacheReader, open_cache
from kdfast.labels import Floor

__all__ = ["CaptureReport", "Repeats"]

BITS = 32  # of a sketch
DIFFERENT = 6  # bits: an angle of 34 degrees between logits. Another batch around a record changes hardly one
SKETCHED_COLUMNS = 2048  # of a record's last row, at most


_MORE = ("known", "duplicates", "conflicts", "bad")  # counts beside the tuple's


class _Counts(NamedTuple):
    batches: int  # run through the teacher
    skipped: int  # batches whose records were all there
    records: int  # added
    rows: int  # added


class CaptureReport(_Counts):
    """What one call of ``capture`` did: the tuple (batches, skipped, records, rows), and these numbers beside it.

    ``batches`` were run through the teacher, ``skipped`` ones held only records that were there; ``records`` and
    ``rows`` were added. ``known`` records were in the cache before, and ``duplicates`` came again in this capture: both
    stayed as they were. ``conflicts`` of these came with other targets or other logits, so that one label serves
    examples that differ. ``bad`` records were left out for a row that cannot be stored. ``floor`` is how near to the
    teacher the labels that were added bring a student; None where the codec draws, whose labels have ``noise`` instead.
    """

    known: int
    duplicates: int
    conflicts: int
    bad: int
    floor: Floor | None
    noise: str
    measured: FloorSums | None
    temperature: float

    def __new__(
        cls,
        batches: int,
        skipped: int,
        records: int,
        rows: int,
        known: int = 0,
        duplicates: int = 0,
        conflicts: int = 0,
        bad: int = 0,
        *,
        measured: FloorSums | None = None,
        temperature: float = 1.0,
        noise: str = "",
    ) -> CaptureReport:
        report = super().__new__(cls, batches, skipped, records, rows)
        report.known, report.duplicates, report.conflicts, report.bad = known, duplicates, conflicts, bad
        report.floor, report.noise = None if measured is None else measured.floor(temperature), noise
        report.measured, report.temperature = measured, temperature
        return report

    def _numbers(self) -> dict[str, int]:
        """All counts by name."""
        return {**self._asdict(), **{name: getattr(self, name) for name in _MORE}}

    def __repr__(self) -> str:
        about = self._numbers() if self.floor is None else {**self._numbers(), "floor": self.floor}
        return f"CaptureReport({', '.join(f'{name}={number}' for name, number in about.items())})"

    @classmethod
    def total(cls, reports: Sequence[CaptureReport]) -> CaptureReport:
        """The sum of several reports."""
        return cls(
            *(sum(column) for column in zip(*(r._numbers().values() for r in reports), strict=True)),
            measured=FloorSums.total(r.measured for r in reports),
            temperature=reports[0].temperature,
            noise=reports[0].noise,
        )

    def text(self) -> str:
        """The numbers in words: those that are 0 only where a reader expects them."""
        parts = [f"{self.records:,} records, {self.rows:,} rows added"]
        parts += [f"{self.known:,} records were stored already"]
        parts += [f"{self.duplicates:,} came again"] * bool(self.duplicates)
        parts += [f"{self.conflicts:,} came with other targets or logits"] * bool(self.conflicts)
        parts += [f"{self.bad:,} left out for a row that is not finite"] * bool(self.bad)
        if self.noise:
            parts += [f"floor: none, the labels are unbiased, with {self.noise}"]
        elif self.floor is not None:
            parts += [f"floor: {self.floor.text()}"]
        return "; ".join(parts)


class _Known(NamedTuple):
    """What is known of a record that this capture has met."""

    targets: tuple[int, ...]  # checksums, one of which holds; empty: there are no targets
    sketch: int | None  # of the logits; None: the teacher has not run, or there is no row

    def differs(self, other: _Known) -> bool:
        """Whether the other one is another record's: by its targets, or clearly by its logits."""
        if self.targets and other.targets and not set(self.targets) & set(other.targets):
            return True
        if self.sketch is None or other.sketch is None:
            return False
        return (self.sketch ^ other.sketch).bit_count() >= DIFFERENT


class Repeats:
    """Counts the records of a capture whose keys are known, and notices those that are not what is known of them.

    A record that comes again with other targets or clearly other logits shares a key with one that it is not, as images
    of one name in several folders do: only the first is stored, and would serve both. The first such one is warned of
    by name. It takes some 200 bytes per record, and one pass of the teacher where there are no targets.

    Args:
        storage: the cache's.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage, self._opened = storage, False
        self._before: CacheReader | None = None  # opened when a record is known
        self._met: dict[Key, _Known] = {}
        self._sketch = _Sketch()
        self._looked = False  # at the logits of a batch that came again
        self.known = self.duplicates = self.conflicts = 0

    def is_unsure(self, keys: Sequence[Any]) -> bool:
        """Whether only the teacher can tell if a batch, all of which came before in this capture, is the same again.

        Of targets there are none, or not each record's. It is so once: where keys do not tell records apart, the first
        such batch shows it.
        """
        if self._looked:
            return False
        met = [self._met.get(make_key(key)) for key in keys]
        self._looked = any(x is not None and x.sketch is not None and not x.targets for x in met)
        return self._looked

    def count(
        self,
        keys: Sequence[Any],
        known: Sequence[bool],
        marks: Sequence[Sequence[Mark]],
        logits: Sequence[Tensor] | None = None,
    ) -> None:
        """Count the records of a batch.

        Args:
            keys: of the records.
            known: whether the writer had each before this batch.
            marks: of each record, one of which holds.
            logits: (rows, vocab) of each record, if the teacher has run.

        Raises:
            CacheMismatchError: the cache holds a record with another number of rows.
        """
        sketches = [None] * len(keys) if logits is None else self._sketch(logits)
        old = []
        for key, had, either, sketch in zip(keys, known, marks, sketches, strict=True):
            digest = make_key(key)
            now = _Known(tuple(_checksum(mark.targets) for mark in either if mark.targets is not None), sketch)
            before = self._met.setdefault(digest, now)
            if before is not now:
                self.duplicates += 1
                if before.differs(now):
                    self._conflict(key, 5)
            elif had:
                old.append((key, now.targets, [mark.rows for mark in either if mark.rows is not None]))
        self.known += len(old)
        if old:
            self._compare(old)

    def _compare(self, records: Sequence[tuple[Any, tuple[int, ...], list[int]]]) -> None:
        """Compare (key, checksums of the targets, rows) of records with what the cache held before this capture."""
        if not isinstance(self._storage, LocalStorage):
            return  # reading it would download it
        if not self._opened:
            self._before, self._opened = _open(self._storage.url), True
        if self._before is None:
            return
        keys = [key for key, _, _ in records]
        stored = zip(self._before.row_counts(keys).tolist(), self._before.target_checksums(keys).tolist(), strict=True)
        for (key, checksums, rows), (had, targets) in zip(records, stored, strict=True):
            if rows and had >= 0 and had not in rows:
                raise CacheMismatchError(
                    f"{describe(key)} is in the cache with {had} rows, and has {rows[-1]} now: it was captured with "
                    "another mask=, or the key is another record's. Records stay as they are: give the mask of then, "
                    "or another path"
                )
            if checksums and targets >= 0 and targets not in checksums:
                self._conflict(key, 6)

    def _conflict(self, key: Any, stacklevel: int) -> None:
        self.conflicts += 1
        if self.conflicts == 1:
            warnings.warn(
                f"{describe(key)} came again with other targets or logits: the record that is stored stays, and is "
                "served for both. Keys must tell records apart: give key=(lambda batch: ...), such as whole paths. "
                "CaptureReport.conflicts counts them",
                stacklevel=stacklevel,  # who has called capture
            )


class _Sketch:
    """Turns a record's last logits into 32 signs of random projections: how many differ tells the angle between two."""

    def __init__(self) -> None:
        self._directions = torch.empty(0, 0)

    def __call__(self, logits: Sequence[Tensor]) -> list[int | None]:
        """A number per record; None for one without rows."""
        filled = [at for at, rows in enumerate(logits) if len(rows)]
        result: list[int | None] = [None] * len(logits)
        if not filled:
            return result
        step = -(-logits[0].shape[1] // SKETCHED_COLUMNS)
        x = torch.stack([logits[at][-1, ::step] for at in filled]).detach().float()
        finite = x.isfinite()  # a masked column counts as an average one
        x = x.masked_fill(~finite, 0.0)
        x = (x - x.sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)).masked_fill(~finite, 0.0)
        width = x.shape[1]
        if self._directions.shape[0] != width or self._directions.device != x.device:
            generator = torch.Generator().manual_seed(0)
            self._directions = torch.randn(width, BITS, generator=generator).to(x.device)
        signs = (x @ self._directions > 0).cpu().numpy()
        for at, number in zip(filled, np.packbits(signs, axis=1).view(">u4")[:, 0].tolist(), strict=True):
            result[at] = number
        return result


def _checksum(targets: Tensor) -> int:
    return targets_crc(targets.reshape(-1).long().cpu())


def _open(path: str) -> CacheReader | None:
    """What is sealed of the cache; None if nothing is. The writer says what is wrong with it."""
    try:
        return open_cache(path)
    except (CacheError, OSError):
        return None
