"""What the commands share: exiting on errors, checking names, progress bars."""

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
    """Exit the command with code 1 and the error's text, for ``CacheError``, ``OSError`` and the types ``also``."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (CacheError, OSError, *also)):
            raise
        Console(stderr=True).print(f"[red]error[/]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def check_choice(name: str, names: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``names``. Raises ``typer.BadParameter`` with all of them otherwise."""
    if name not in names:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(names)}")
    return name


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error for a ``with`` block, so that the output stays clean.

    Args:
        title: the text before the bar.
        total: the number of steps; None if it is not known.

    Yields:
        A function that advances the bar by a number of steps.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda steps: progress.advance(task, steps)
