"""What commands share: how one ends when a cache, a file or a name is at fault, and a bar for what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kdfast.cache import CacheError

__all__ = ["check_choice", "exit_on_error", "progress_bar"]


@contextmanager
def exit_on_error(*also: type[Exception]) -> Iterator[None]:
    """End the command with the error's text and exit code 1: for ``CacheError``, ``OSError`` and ``also``."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (CacheError, OSError, *also)):
            raise
        Console(stderr=True).print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def check_choice(name: str, names: Iterable[str]) -> str:
    """The name, if it is one of them."""
    if name not in names:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(names)}")
    return name


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function that moves the bar on by a number of steps. ``total`` None: it is not known how far it goes."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda steps: progress.advance(task, steps)
