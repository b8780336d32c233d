"""``salvage``: seal what killed writers have left."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from kdfast.cache.errors import CacheBusyError
from kdfast.cache.format.sealed import write_manifest
from kdfast.cache.format.storage import LocalStorage, Storage, open_storage
from kdfast.cache.write.builder import BLOCK_ROWS, SHARD_BYTES
from kdfast.cache.write.session import JOURNAL_NAME, Session, work_folder

__all__ = ["salvage"]

LEFT_OVER = re.compile(r".+\.\d+-[0-9a-f]{8}\.part")  # a file that was being published: it is never read
OLD_S = 24 * 3600  # nobody publishes a file for so long


def salvage(
    path: str | os.PathLike[str], *, staging: str | os.PathLike[str] | None = None, keep: Collection[str] = ()
) -> int:
    """Seal every unfinished shard of a cache that no live writer holds, up to its last good block.

    Files that killed processes left half published are removed when they are a day old.

    A writer that will be started again needs no salvage: it resumes by itself, and its shards then come out as if it
    had never stopped. After a salvage the records are the same, but shards end elsewhere.

    Args:
        path: the cache's directory or URL.
        staging: as ``Writer`` was given it.
        keep: names of writers that will resume by themselves, whose shards are left alone.

    Returns:
        The number of records sealed.

    Raises:
        CacheError, ValueError, OSError: of the first shard that could not be sealed, when all others have been; what
            it holds stays as it is.
    """
    storage = open_storage(path)
    folder = work_folder(storage, staging)
    files = LocalStorage(folder).list() if folder.is_dir() else []
    names = {match[1] for name in files if (match := JOURNAL_NAME.fullmatch(name))}
    sealed = 0
    errors: list[Exception] = []
    for writer in sorted(names - set(keep)):
        try:
            sealed += _salvage(storage, folder, writer)
        except (ValueError, OSError) as error:  # also of a codec that is not registered, or an asset that is missing
            errors.append(error)
    if sealed:
        write_manifest(storage)
    for name in filter(LEFT_OVER.fullmatch, files):
        with suppress(OSError):  # another process may have been faster
            if time.time() - (folder / name).lstat().st_mtime > OLD_S:
                (folder / name).unlink()
    if errors:
        raise errors[0]
    return sealed


def _salvage(storage: Storage, folder: Path, writer: str) -> int:
    try:
        session = Session(storage, folder, writer, None)
    except CacheBusyError:
        return 0
    builder = None
    try:
        if session.has_left and session.meta is not None:
            codec = session.meta.make_codec(storage.read_bytes, storage.url)
            builder = session.builder(codec, BLOCK_ROWS, SHARD_BYTES)
            builder.advance(final=True)
        return 0 if builder is None else builder.durable
    finally:
        session.close(builder)
