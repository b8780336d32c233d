"""How a command ends when a cache, a file or a name is at fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from kdfast.cache import CacheError

__all__ = ["failing", "known"]


@contextmanager
def failing(*also: type[Exception]) -> Iterator[None]:
    """End the command with the error's text and exit code 1: for ``CacheError``, ``OSError`` and ``also``."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (CacheError, OSError, *also)):
            raise
        Console(stderr=True).print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def known(name: str, names: Iterable[str]) -> str:
    """The name, if it is one of them."""
    if name not in names:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(names)}")
    return name
