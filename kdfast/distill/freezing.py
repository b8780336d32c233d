"""Freezing a part of a model, which then stays still while the rest is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["freeze", "frozen_norms", "training"]


def freeze(module: nn.Module, patterns: Sequence[str | re.Pattern[str]]) -> list[str]:
    """Take the parameters that a pattern names out of training; returns their names::

        freeze(student, ["encoder.*", re.compile(r"layers\\.[0-3]\\.")])

    A module of which that takes every parameter, and which has running statistics, is put in evaluation mode: a frozen
    batch norm keeps its statistics, too. One without parameters goes by the nearest module around it that has some.

    Args:
        module: whose.
        patterns: each a glob over whole names, of which ``*`` also matches dots, or a compiled regular expression,
            which is searched for.

    Raises:
        ValueError: a pattern matches no parameter.
        TypeError: ``patterns`` is a single string.
    """
    if isinstance(patterns, str):
        raise TypeError(f"freeze takes a list of patterns, got the string {patterns!r}")
    names = [name for name, _ in module.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if _matches(pattern, name)}
        if not found:
            raise ValueError(
                f"freeze: {pattern!r} matches none of {', '.join(names[:8])}{', ...' if names[8:] else ''}"
            )
        frozen |= found
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    for part in frozen_norms(module, frozen):
        part.eval()
    return sorted(frozen)


def frozen_norms(module: nn.Module, frozen: set[str]) -> list[nn.Module]:
    """The parts with running statistics of which every parameter is frozen.

    One without parameters, such as a batch norm that is not affine, goes by what is around it.
    """
    found = []
    for prefix, part in module.named_modules():
        governing = _governing(module, prefix)
        if governing and governing <= frozen and any(True for _ in part.buffers(recurse=False)):
            found.append(part)
    return found


@contextmanager
def training(student: nn.Module, norms: list[nn.Module]) -> Iterator[None]:
    """Training mode for a student that is not in it, but for ``norms``. Every part's own mode comes back afterwards."""
    flags = {module: module.training for module in student.modules()}
    if not student.training:
        student.train()
    for module in norms:  # its owner may have called train() since it was frozen
        module.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _governing(module: nn.Module, prefix: str) -> set[str]:
    """The names of a part's own parameters, or of all in the nearest module around it that has any."""
    names = {name for name, _ in module.get_submodule(prefix).named_parameters(prefix, recurse=False)}
    while not names and prefix:
        prefix = prefix.rpartition(".")[0]
        names = {name for name, _ in module.get_submodule(prefix).named_parameters(prefix)}
    return names


def _matches(pattern: str | re.Pattern[str], name: str) -> bool:
    return fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.search(name) is not None
