"""The steps that a program takes on its files: counted, and at one of them something happens.

A step is a call that changes a file, a name or a directory below one folder, or reads a file there: ``os.open``,
``os.pwrite``, ``os.replace``, a file object's ``write``, ... What is outside the folder, and what a test itself does,
does not count.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BY_PATH = ("open", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
BY_DESCRIPTOR = ("pwrite", "ftruncate", "fsync")
WRITES = ("pwrite", "write")

Event = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
REAL = {name: getattr(os, name) for name in (*BY_PATH, *BY_DESCRIPTOR)}
REAL_OPEN = io.open


class Steps:
    """Counts the steps below ``folder``, and hands the one of number ``at`` (from 0) to ``event``.

    ``event(name, call, arguments, keywords)`` stands for the call: it makes it, or part of it, or fails.
    """

    def __init__(self, folder: Path, at: int = -1, event: Event | None = None, *, repeat: bool = False) -> None:
        self.count = 0
        self.names: list[str] = []
        self._folder, self._at, self._event, self._repeat = str(folder), at, event, repeat

    def step(self, name: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        number, self.count = self.count, self.count + 1
        self.names.append(name)
        if self._event is not None and (number == self._at or (self._repeat and number > self._at >= 0)):
            return self._event(name, call, arguments, keywords)
        return call(*arguments, **keywords)

    def is_below(self, where: Any) -> bool:
        """Whether a path or an open file lies below the folder."""
        try:
            path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else os.fspath(where)
        except (OSError, TypeError):
            return False
        return isinstance(path, str) and path.startswith(self._folder)


def counted(steps: Steps, name: str) -> Callable[..., Any]:
    real = REAL[name]

    def call(where: Any, *rest: Any, **keywords: Any) -> Any:
        if not steps.is_below(where):
            return real(where, *rest, **keywords)
        return steps.step(name, real, where, *rest, **keywords)

    return call


class Raw(io.FileIO):
    """A file whose reads and writes are steps."""

    steps: Steps

    def write(self, data: Any) -> int:
        return self.steps.step("write", super().write, data)

    def readinto(self, buffer: Any) -> int:
        return self.steps.step("read", super().readinto, buffer)

    def readall(self) -> bytes:
        return self.steps.step("read", super().readall)


def opener(steps: Steps) -> Callable[..., Any]:
    def opening(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **keywords: Any) -> Any:
        if "b" not in mode or not steps.is_below(file):
            return REAL_OPEN(file, mode, buffering, *rest, **keywords)
        closefd = keywords.get("closefd", True)
        raw = steps.step("open", Raw, file, mode.replace("b", ""), closefd=closefd)
        raw.steps = steps
        if buffering == 0:
            return raw
        wrapper = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        return wrapper(raw)

    return opening


@contextmanager
def watched(steps: Steps) -> Iterator[Steps]:
    """A context in which the process's steps go through ``steps``."""
    for name in REAL:
        setattr(os, name, counted(steps, name))
    io.open = builtins.open = opener(steps)
    try:
        yield steps
    finally:
        for name, real in REAL.items():
            setattr(os, name, real)
        io.open = builtins.open = REAL_OPEN


# ---- what can happen -------------------------------------------------------------------------------------------------


def failing(code: int) -> Event:
    """The call fails with the error ``code``."""

    def event(name: str, call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        where = arguments[0] if arguments and isinstance(arguments[0], (str, os.PathLike)) else None
        raise OSError(code, os.strerror(code), *([] if where is None else [os.fspath(where)]))

    return event


def half(name: str, call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Make a part of a write; any other call as it is."""
    if name == "pwrite":
        descriptor, data, offset = arguments
        return call(descriptor, bytes(data)[: max(1, len(data) // 2)], offset)
    if name == "write":
        return call(bytes(arguments[0])[: max(1, len(arguments[0]) // 2)])
    return call(*arguments, **keywords)


def half_then(code: int) -> Event:
    """A write is made by half, and that is all: it fails, as on a disk that becomes full. Other calls fail."""

    def event(name: str, call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if name in WRITES:
            half(name, call, arguments, keywords)
        return failing(code)(name, call, arguments, keywords)

    return event


def signalled(number: int, when: str) -> Event:
    """The process gets a signal ``before`` the call, ``after`` it, or when a write is ``torn``."""

    def event(name: str, call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if when == "before":
            os.kill(os.getpid(), number)
            return call(*arguments, **keywords)
        result = half(name, call, arguments, keywords) if when == "torn" else call(*arguments, **keywords)
        os.kill(os.getpid(), number)
        return result

    return event


FAULTS: dict[str, tuple[Event, bool]] = {
    "ENOSPC once": (failing(errno.ENOSPC), False),
    "ENOSPC from then on": (half_then(errno.ENOSPC), True),
    "EIO once": (failing(errno.EIO), False),
    "EIO from then on": (failing(errno.EIO), True),
    "EINTR once": (failing(errno.EINTR), False),
    "a short write": (half, False),
}
