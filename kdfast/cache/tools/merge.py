"""``merge``: copying the shards of several caches into one directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdfast._atomic import publish, with_filename
from kdfast.cache.errors import CacheError, CacheMismatchError
from kdfast.cache.format.manifest import SHARD_NAME, load_shards
from kdfast.cache.format.sealed import write_manifest
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.storage import LocalStorage
from kdfast.cache.read.reader import open_cache

__all__ = ["MergeReport", "merge"]

CHUNK = 8 * 2**20
UNFINISHED = (".part", ".journal")  # what a writer is at work on, or has left when it was killed


@dataclass
class MergeReport:
    """What one call of ``merge`` did, and what the destination holds now."""

    copied: int = 0  # shards
    present: int = 0  # shards that were there already, by an earlier run
    assets: int = 0
    copied_bytes: int = 0
    records: int = 0
    duplicates: int = 0
    unfinished: list[str] = field(default_factory=list)  # what a source's writer has not sealed: not merged


def merge(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    link: bool = False,
    progress: Callable[[], None] | None = None,
) -> MergeReport:
    """Bring the records of ``sources``, caches of one kind, together in ``destination``.

    Shards are checked byte by byte and copied as they are, under names that keep the order of the sources: of records
    with equal keys, one that the destination had before stays, then that of the first source. Each file appears
    whole or not at all, and a second run resumes one that was cut short.

    Args:
        sources: directories. They stay as they are.
        destination: a directory: new, empty, or a cache of the same kind.
        link: make hard links instead of copies. Both directories must lie on one file system.
        progress: called after each shard.

    Raises:
        CacheError: a source holds no shard, or is the destination.
        CacheMismatchError: two of the caches differ in codec, options, vocabulary, temperatures or teacher.
        CacheCorruptError: a shard is corrupt.
        OSError: a file cannot be read, written or linked.
    """
    target = Path(destination)
    loaded = {path: _load(path, target) for path in dict.fromkeys(map(Path, sources))}
    if not loaded:
        raise CacheError("merge needs at least one source")
    held = load_shards(LocalStorage(target)) if target.exists() else []
    _require_one_kind([*loaded.values(), *([held] if held else [])])
    target.mkdir(parents=True, exist_ok=True)
    report = MergeReport()
    for path, shards in loaded.items():
        _copy_assets(path, shards[0], target, report)
        report.unfinished += sorted(str(file) for file in path.iterdir() if file.suffix in UNFINISHED)
    for shard, name in _names(list(loaded.values()), held):
        _copy_shard(shard, None if name is None else target / name, link, report)
        if progress is not None:
            progress()
    write_manifest(LocalStorage(target))
    _count(target, report)
    return report


def _load(path: Path, target: Path) -> list[Shard]:
    if target.exists() and path.exists() and path.samefile(target):
        raise CacheError(f"{path}: is both a source and the destination")
    shards = load_shards(LocalStorage(path))
    if not shards:
        raise CacheError(f"{path}: holds no shard of a kdfast cache")
    return shards


def _require_one_kind(caches: list[list[Shard]]) -> None:
    first = caches[0][0]
    for other in (shards[0] for shards in caches[1:]):
        try:
            other.meta.require_equal(first.meta, str(other.path), str(first.path))
        except CacheMismatchError as error:
            raise CacheMismatchError(f"the caches cannot be merged: {error}") from error


def _names(caches: list[list[Shard]], held: list[Shard]) -> Iterator[tuple[Shard, str | None]]:
    """Yield each shard with its new name, None if the destination holds the same shard already.

    Names start with the number of the source, so that the sources' order is the order of the records. Numbers start
    where no name is taken by another shard.
    """
    seals = {shard.seal for shard in held}
    taken = {shard.path.name: shard.seal for shard in held}
    start = 0
    while not all(taken.get(name, shard.seal) == shard.seal for shard, name in _numbered(caches, start)):
        start += 1
    for shard, name in _numbered(caches, start):
        yield shard, None if shard.seal in seals else name
        seals.add(shard.seal)


def _numbered(caches: list[list[Shard]], start: int) -> Iterator[tuple[Shard, str]]:
    for number, shards in enumerate(caches, start):
        for shard in shards:
            match = SHARD_NAME.fullmatch(shard.path.name)
            assert match is not None  # load_shards found it by this pattern
            yield shard, f"shard-merged{number:04d}_{match[1]}-{match[2]}.safetensors"


def _copy_shard(shard: Shard, path: Path | None, link: bool, report: MergeReport) -> None:
    if path is None:
        report.present += 1
        return
    shard.verify()  # a copy of a corrupt shard would outlive the chance to mend it
    _copy(shard.path, path, link)
    report.copied += 1
    report.copied_bytes += shard.file_bytes


def _copy_assets(source: Path, shard: Shard, target: Path, report: MergeReport) -> None:
    """Copy the files that the codec reads beside the shards. They come first: shards are of no use without them."""
    names: list[str] = []

    def read(name: str) -> bytes:
        names.append(name)
        return (source / name).read_bytes()

    shard.meta.make_codec(read)
    for name in names:
        if not (target / name).exists():
            _copy(source / name, target / name, link=False)
            report.assets += 1


def _copy(source: Path, path: Path, link: bool) -> None:
    if not link:
        publish(path, _chunks(source))
        return
    with with_filename(path):
        os.link(source, path)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _count(target: Path, report: MergeReport) -> None:
    about = open_cache(target).info
    report.records, report.duplicates = about.records, about.duplicates
