"""``merge``: copying the shards of several caches into one directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kdfast._atomic import with_filename
from kdfast.cache.errors import CacheError, CacheMismatchError
from kdfast.cache.format.declared import DECLARATION, Declaration, declare, read_declaration
from kdfast.cache.format.manifest import SHARD_NAME, load_shards, no_shard, unfinished_names
from kdfast.cache.format.meta import CacheMeta
from kdfast.cache.format.sealed import scan, write_manifest
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.sorted_keys import sort_keys
from kdfast.cache.format.storage import LocalStorage, Storage, open_storage

__all__ = ["MergeReport", "merge"]


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
        sources: directories or URLs. They stay as they are; remote shards are downloaded as ``open`` does.
        destination: a directory or URL: new, empty, or a cache of the same kind.
        link: make hard links instead of copies. Both must be directories of one file system.
        progress: called after each shard.

    Raises:
        TypeError: ``sources`` is one path.
        CacheError: a source holds no shard, or is the destination; or ``link`` with a URL.
        CacheMismatchError: two of the caches differ in codec, options, vocabulary, temperatures or teacher.
        CacheCorruptError: a shard is corrupt.
        OSError: a file cannot be read, written or linked.
    """
    if isinstance(sources, (str, bytes, os.PathLike)):
        raise TypeError(f"sources must be a list of caches, got one, {sources}: give [{sources!r}]")
    target = open_storage(destination)
    storages = {storage.url: storage for storage in map(open_storage, sources)}
    if not storages:
        raise CacheError("merge needs at least one source")
    if link and not all(isinstance(storage, LocalStorage) for storage in (target, *storages.values())):
        raise CacheError("link=True makes hard links, which lead from a directory to a directory, not to a URL")
    caches = {url: _load(storage, target) for url, storage in storages.items()}
    held = _held(target)
    _require_one_kind(caches, held, target)
    target.create()
    _declare(target, storages, caches)
    report = MergeReport()
    for url, storage in storages.items():
        _copy_assets(storage, caches[url][0], target, report)
        report.unfinished += [storage.describe(name) for name in unfinished_names(storage)]
    for shard, name in _names(list(caches.values()), held):
        _copy_shard(shard, name, target, link, report)
        if progress is not None:
            progress()
    write_manifest(target)
    _count(target, report)
    return report


class _Held(Protocol):
    """A shard that the destination has: its name, what it is, and its seal."""

    name: str
    meta: CacheMeta
    seal: str


def _load(storage: Storage, target: Storage) -> list[Shard]:
    if _same(storage, target):
        raise CacheError(f"{storage.url}: is both a source and the destination")
    shards = load_shards(storage)
    if not shards:
        raise no_shard(storage)
    return shards


def _same(one: Storage, other: Storage) -> bool:
    if isinstance(one, LocalStorage) and isinstance(other, LocalStorage):
        folders = one.directory, other.directory
        return all(folder.exists() for folder in folders) and folders[0].samefile(folders[1])
    return one.url.rstrip("/") == other.url.rstrip("/")


def _held(target: Storage) -> list[_Held]:
    """The shards that the destination has. Of a remote one only their tables are fetched."""
    try:
        return list(scan(target))
    except FileNotFoundError:
        return []


def _require_one_kind(caches: dict[str, list[Shard]], held: list[_Held], target: Storage) -> None:
    kinds = [(str(shards[0].path), shards[0].meta) for shards in caches.values()]
    kinds += [(target.describe(shard.name), shard.meta) for shard in held[:1]]
    declared = None if held else read_declaration(target)
    if declared is not None and unfinished_names(target):  # a writer has begun, and has no shard yet
        kinds.append((target.describe(DECLARATION), declared.meta))
    for where, meta in kinds[1:]:
        try:
            meta.require_equal(kinds[0][1], where, kinds[0][0])
        except CacheMismatchError as error:
            raise CacheMismatchError(f"the caches cannot be merged: {error}") from error


def _declare(target: Storage, storages: dict[str, Storage], caches: dict[str, list[Shard]]) -> None:
    """Say in the destination what it is, with what the first source says of the teacher's fingerprint."""
    url, shards = next(iter(caches.items()))
    there, source = read_declaration(target), read_declaration(storages[url])
    if there is None or there.meta != shards[0].meta:
        parts = {} if source is None or source.meta != shards[0].meta else source.teacher_parts
        declare(target, Declaration(shards[0].meta, parts), replace=there is not None)


def _names(caches: list[list[Shard]], held: list[_Held]) -> Iterator[tuple[Shard, str | None]]:
    """Yield each shard with its new name, None if the destination holds the same shard already.

    Names start with the number of the source, so that the sources' order is the order of the records. Numbers start
    where no name is taken by another shard.
    """
    seals = {shard.seal for shard in held}
    taken = {shard.name: shard.seal for shard in held}
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
            if match is None:
                raise CacheError(f"{shard.path}: is not a shard's name")
            yield shard, f"shard-merged{number:04d}_{match[1]}-{match[2]}.safetensors"


def _copy_shard(shard: Shard, name: str | None, target: Storage, link: bool, report: MergeReport) -> None:
    if name is None:
        report.present += 1
        return
    shard.verify()  # a copy of a corrupt shard would outlive the chance to mend it
    if link and isinstance(target, LocalStorage):
        path = target.directory / name
        with with_filename(path):
            os.link(shard.path, path)
    else:
        target.add(shard.path, name)
    report.copied += 1
    report.copied_bytes += shard.file_bytes


def _copy_assets(source: Storage, shard: Shard, target: Storage, report: MergeReport) -> None:
    """Copy the files that the codec reads beside the shards. They come first: shards are of no use without them."""
    files: dict[str, bytes] = {}

    def read(name: str) -> bytes:
        files[name] = source.read_bytes(name)
        return files[name]

    shard.meta.make_codec(read, shard.path)
    for name, data in files.items():
        if not target.exists(name):
            target.publish(name, [data])
            report.assets += 1


def _count(target: Storage, report: MergeReport) -> None:
    shards = scan(target)
    report.duplicates = len(sort_keys(shards).duplicates)
    report.records = sum(len(shard.keys) for shard in shards) - report.duplicates
