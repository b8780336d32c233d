"""Packages that only some formats need, imported when they are."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kdfast.cache.errors import CacheError

__all__ = ["need"]


def need(module: str, purpose: str) -> Any:
    """The module, imported. Raises ``CacheError`` naming the package if it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise CacheError(f"{purpose} needs the package {package}: pip install {package}") from error
