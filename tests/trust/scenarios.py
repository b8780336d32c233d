"""What the fault injectors run, and how they settle up afterwards: record by record, against what was durable.

A scenario has a state to begin with, made once; something that is run on a copy of it, which notes how far it has come;
and an account: how many records of those that were durable are lost, and how many labels are wrong.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import contextlib

import kdfast.cache
from kdfast.cache.tools.merge import merge
from kdfast.distill import checkpoint
from support.caches import contents, record, write

RECORDS = 24
Note = Callable[[int, int], None]  # how many records have been accepted, and how many of them are durable


class Account(NamedTuple):
    """What a look at the files has found."""

    records: int = 0  # looked at
    lost: int = 0
    wrong: int = 0
    notes: tuple[str, ...] = ()

    def plus(self, other: Account) -> Account:
        """Both together."""
        return Account(*(a + b for a, b in zip(self, other, strict=True)))


class Scenario:
    """Base of all scenarios.

    Args:
        base: a folder of its own, where the state to begin with lies, and what a run without faults leaves.
    """

    name = ""

    def __init__(self, base: Path) -> None:
        self.start, self.whole = base / "start", base / "whole"
        self.start.mkdir(parents=True)
        self.prepare(self.start)
        shutil.copytree(self.start, self.whole)
        self.run(self.whole, lambda accepted, durable: None)
        self.expected = self.look(self.whole)

    def look(self, folder: Path) -> dict[Any, Any]:
        """The labels that are there, by number."""
        return present(folder)

    def prepare(self, folder: Path) -> None:
        """Make the state to begin with."""

    def run(self, folder: Path, note: Note) -> None:
        """Do what is tested."""

    def settle(self, folder: Path, kept: int) -> Account:
        """Look at what is left, of which the first ``kept`` records must be there; then run it to its end."""
        raise NotImplementedError


def present(folder: Path) -> dict[Any, Any]:
    """The labels of the records that a cache holds, by number."""
    try:
        cache = kdfast.cache.open(folder)
    except kdfast.cache.CacheError as error:
        if "holds no shard" not in str(error):
            raise
        return {}
    except FileNotFoundError:
        return {}
    cache.verify()
    return {i: cache[i] for i in range(RECORDS) if i in cache}


def same(one: Any, other: Any) -> bool:
    """Whether labels are equal, bit for bit. How far they are from the teacher is a matter of the whole cache."""
    ours, theirs = ({**labels.to_fields(), "floor": None} for labels in (one, other))
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        for name, value in ours.items()
    )


def compare(folder: Path, expected: dict[Any, Any], kept: int, what: str) -> Account:
    """Account for the records of the cache in ``folder``, the first ``kept`` of which must be there."""
    found = present(folder)
    lost = [i for i in range(kept) if i not in found]
    wrong = [i for i, labels in found.items() if not same(labels, expected[i])]
    notes = [f"{what}: lost {lost}"] * bool(lost) + [f"{what}: wrong {wrong}"] * bool(wrong)
    return Account(len(set(found) | set(range(kept))), len(lost), len(wrong), tuple(notes))


class Write(Scenario):
    """A writer fills a cache of several shards, and is resumed."""

    name, codec, options = "write", "topk", {}

    def run(self, folder: Path, note: Note) -> None:
        defaults = {"vocab_size": 11, "teacher": "t", "block_rows": 8, "shard_bytes": 1500}
        defaults |= {"k": 4} if self.codec == "topk" else {"learn_rows": 20, "table": "abc"}
        with kdfast.cache.Writer(folder, codec=self.codec, **{**defaults, **self.options}) as writer:
            for i in range(RECORDS):
                if i not in writer:
                    key, rows, extras = record(i)
                    writer.add(key, rows, **extras)
                note(i + 1, writer.durable_records)

    def settle(self, folder: Path, kept: int) -> Account:
        with tempfile.TemporaryDirectory() as copy:
            sealed = Path(copy) / "cache"
            shutil.copytree(folder, sealed)
            kdfast.cache.salvage(sealed)
            account = compare(sealed, self.expected, kept, "salvaged")
        self.run(folder, lambda accepted, durable: None)
        if contents(folder) == contents(self.whole):
            return account.plus(Account(RECORDS))
        account = account.plus(compare(folder, self.expected, RECORDS, "resumed"))
        return account.plus(Account(0, 0, 1, ("resumed: other bytes",)))


class WriteModel(Write):
    """A codec that learns from the first rows, and has a table beside the shards."""

    name, codec = "write with a model", "toy"


class WriteRange(Write):
    """Integer keys, of which a shard keeps the first."""

    name, options = "write consecutive keys", {"keys": "range"}


class Resume(Write):
    """A writer takes up what an interrupted one has left: complete blocks, and parked records."""

    name = "resume"

    def prepare(self, folder: Path) -> None:
        with contextlib.suppress(ZeroDivisionError):
            write(folder, range(10), announce=lambda i: 1 // (9 - i))


class Parked(Resume):
    """The records that are taken up are in no block yet."""

    name, options = "resume parked records", {"block_rows": 20, "shard_bytes": 100}

    def prepare(self, folder: Path) -> None:
        with contextlib.suppress(ZeroDivisionError):
            write(folder, range(5), block_rows=20, shard_bytes=100, announce=lambda i: 1 // (4 - i))


class Salvage(Resume):
    """What two writers have left is sealed."""

    name = "salvage"

    def prepare(self, folder: Path) -> None:
        for name, records in (("a", range(10)), ("b", range(10, 18))):
            with contextlib.suppress(ZeroDivisionError):
                write(folder, records, writer=name, announce=lambda i, end=records[-1]: 1 // (end - i))

    def run(self, folder: Path, note: Note) -> None:
        note(18, 18)
        kdfast.cache.salvage(folder)

    def settle(self, folder: Path, kept: int) -> Account:
        account = compare(folder, self.expected, 0, "sealed")
        kdfast.cache.salvage(folder)
        return account.plus(compare(folder, self.expected, 18, "salvaged"))


class Merge(Scenario):
    """Two caches are merged into a third."""

    name = "merge"

    def prepare(self, folder: Path) -> None:
        write(folder / "a", range(12))
        write(folder / "b", range(8, RECORDS), writer="b")

    def look(self, folder: Path) -> dict[Any, Any]:
        return present(folder / "all")

    def run(self, folder: Path, note: Note) -> None:
        merge([folder / "a", folder / "b"], folder / "all")

    def settle(self, folder: Path, kept: int) -> Account:
        account = compare(folder / "all", self.expected, 0, "merged")
        self.run(folder, lambda accepted, durable: None)
        account = account.plus(compare(folder / "all", self.expected, RECORDS, "merged again"))
        for name in ("a", "b"):
            if contents(folder / name) != contents(self.start / name):
                account = account.plus(Account(0, 0, 1, (f"the source {name} has changed",)))
        return account


class Checkpoint(Scenario):
    """A trainer writes one checkpoint after another; each is a record."""

    name, saves = "checkpoint", 6

    def look(self, folder: Path) -> dict[Any, Any]:
        return {}

    def content(self, number: int) -> dict[str, Any]:
        about = {"version": checkpoint.VERSION, checkpoint.CHECKED: True}
        return {**about, "student": {"weight": torch.full((50,), float(number))}, "number": number}

    def run(self, folder: Path, note: Note) -> None:
        for number in range(1, self.saves + 1):
            checkpoint.save(folder / "last.pt", self.content(number))
            note(number, number)

    def settle(self, folder: Path, kept: int) -> Account:
        path = folder / "last.pt"
        if not path.exists():
            return Account(kept, kept, 0, (f"{kept} checkpoints saved, none there",) * bool(kept))
        found = checkpoint.load(path)
        number = found["number"]
        lost = max(0, kept - number)
        wrong = not torch.equal(found["student"]["weight"], self.content(number)["student"]["weight"])
        return Account(max(kept, number), lost, int(wrong), (f"saved {kept}, found {number}",) * bool(lost or wrong))


SCENARIOS: tuple[type[Scenario], ...] = (Write, WriteModel, WriteRange, Resume, Parked, Salvage, Merge, Checkpoint)


def make_all(base: Path) -> list[Scenario]:
    """Every scenario, in a folder of its own below ``base``."""
    warnings.simplefilter("ignore")  # writers say what they could not keep
    torch.set_num_threads(1)
    return [kind(base / str(number)) for number, kind in enumerate(SCENARIOS)]
