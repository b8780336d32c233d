"""``cache.json``: what a cache is, published by its first writer, so that others learn it before they have a shard.

A reader does not need it: every shard says the same. A writer compares with it when it opens the cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from kdfast.cache.errors import CacheCorruptError, CacheError, CacheMismatchError
from kdfast.cache.format.meta import CacheMeta
from kdfast.cache.format.storage import LocalStorage, Storage
from kdfast.cache.format.strict import parse_json
from kdfast.cache.format.teacher import differences

__all__ = ["DECLARATION", "Declaration", "declare", "read_declaration", "require_agreement"]

DECLARATION = "cache.json"


class Declaration(NamedTuple):
    """What a cache is, and what its teacher's fingerprint was made of, as far as that is known."""

    meta: CacheMeta
    teacher_parts: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        strings = {name: value for name, value in self.meta.to_strings().items() if name != "kdfast"}
        document: dict[str, object] = dict(strings)
        if self.teacher_parts:
            document["teacher_parts"] = dict(self.teacher_parts)
        return json.dumps(document, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Declaration:
        """Read what ``to_bytes`` gave. Raises ``CacheError`` for another version, else ``ValueError``."""
        document = parse_json(data)
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        parts = document.pop("teacher_parts", {})
        if not isinstance(parts, dict) or not all(isinstance(value, str) for value in document.values()):
            raise ValueError("it holds values that are not strings")
        return cls(CacheMeta.from_strings(document), {str(name): str(value) for name, value in parts.items()})


def read_declaration(storage: Storage) -> Declaration | None:
    """The cache's declaration; None without one.

    Raises:
        CacheCorruptError: it cannot be read.
        CacheError: it is of another version.
    """
    try:
        data = storage.read_bytes(DECLARATION)
    except FileNotFoundError:
        return None
    where = storage.describe(DECLARATION)
    try:
        return Declaration.from_bytes(data)
    except CacheError as error:
        raise CacheError(f"{where}: {error}") from error
    except ValueError as error:
        if not isinstance(storage, LocalStorage):
            return None  # an upload that broke off: the next writer repeats it
        raise CacheCorruptError(f"{where}: cannot be read ({error}); delete it, the shards say the same") from error


def declare(storage: Storage, declaration: Declaration, *, replace: bool = False) -> Declaration:
    """Publish ``declaration``, and return the one that is there now: that of another writer if it was faster."""
    if replace:
        storage.publish(DECLARATION, [declaration.to_bytes()])
    elif not storage.publish_new(DECLARATION, declaration.to_bytes()):
        return read_declaration(storage) or declaration
    return declaration


def require_agreement(ours: Declaration, theirs: CacheMeta, parts: Mapping[str, str], where: str) -> None:
    """Raise ``CacheMismatchError`` if ``ours`` differs from ``theirs``, saying in what.

    Args:
        parts: what their teacher's fingerprint was made of.
        where: what they are, for the message.
    """
    try:
        ours.meta.require_equal(theirs, "this writer", where)
    except CacheMismatchError as error:
        if ours.meta.teacher == theirs.teacher:
            raise
        found = differences(ours.teacher_parts, parts)
        raise CacheMismatchError(f"{error}; of the teachers differ: {found}" if found else str(error)) from error
