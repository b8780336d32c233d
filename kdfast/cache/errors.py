"""The errors of a cache. A failing disk raises ``OSError`` with the file's name."""

from __future__ import annotations

from typing import Any

from kdfast._optional import import_optional

__all__ = ["CacheBusyError", "CacheCorruptError", "CacheError", "CacheMismatchError", "optional_package"]


class CacheError(ValueError):
    """A cache cannot be read or written as asked."""


class CacheCorruptError(CacheError):
    """Bytes on disk are not the bytes that were written. The message names the shard, and the block if it is one."""


class CacheBusyError(CacheError):
    """A writer of the same name is at work in the directory."""


class CacheMismatchError(CacheError):
    """Two parts of a cache, or a cache and its writer, differ in codec, vocabulary, temperatures or teacher."""


def optional_package(module: str, purpose: str) -> Any:
    """Import ``module``. Raises ``CacheError`` naming the package to install if it is not there."""
    try:
        return import_optional(module, purpose)
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        raise CacheError(str(error)) from error
