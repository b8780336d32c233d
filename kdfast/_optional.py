"""Imports that happen only when asked for: optional packages, and kdfast's own heavier modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["import_optional", "lazy_attributes"]


def import_optional(module: str, purpose: str, *, extra: str | None = None) -> Any:
    """Import a module of an optional package. Returns the module.

    Args:
        module: its full name.
        purpose: what needs it, as the subject of the error's sentence.
        extra: the extra of kdfast that brings the package, if there is one.

    Raises:
        ImportError: the package is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        install = package if extra is None else f'"kdfast[{extra}]"'
        raise ImportError(f"{purpose} needs the package {package}: pip install {install}") from error


def lazy_attributes(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562) that imports a name's module when the name is first used.

    Args:
        where: for each name the module that holds it. A name that is the module's own last part is the module.
    """

    def find(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(where[name])
        return module if where[name] == f"{package}.{name}" else getattr(module, name)

    return find
