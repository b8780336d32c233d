"""Frozen parts of a model: their parameters are not trained, and their running statistics do not change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["freeze", "frozen_norms", "training"]


def freeze(module: nn.Module, patterns: Sequence[str | re.Pattern[str]]) -> list[str]:
    """Freeze the parameters that match a pattern: they get no gradient. Returns their names, sorted::

        freeze(student, ["encoder.*", re.compile(r"layers\\.[0-3]\\.")])

    A module with running statistics whose parameters are all frozen is put in evaluation mode, so that a frozen batch
    norm keeps its statistics, too. A module without parameters follows the nearest enclosing module that has some.

    Args:
        module: the model.
        patterns: each is a glob over a parameter's whole name, in which ``*`` also matches dots, or a compiled regular
            expression, which may match anywhere in the name.

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
    """The modules with running statistics whose parameters are all frozen, such as batch norms.

    A module without parameters, such as a batch norm that is not affine, follows the nearest enclosing module that has
    some.

    Args:
        module: the model.
        frozen: the names of its frozen parameters.
    """
    found = []
    for prefix, part in module.named_modules():
        governing = _governing(module, prefix)
        if governing and governing <= frozen and any(True for _ in part.buffers(recurse=False)):
            found.append(part)
    return found


@contextmanager
def training(student: nn.Module, norms: list[nn.Module]) -> Iterator[None]:
    """Put a student that is in evaluation mode in training mode for a ``with`` block, and ``norms`` in evaluation mode.

    The mode of each of its submodules is restored afterwards. The parts of a student in training mode keep their modes.
    """
    flags = {module: module.training for module in student.modules()}
    if not student.training:
        student.train()
    for module in norms:  # someone may have called student.train() since the norm was frozen
        module.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _governing(module: nn.Module, prefix: str) -> set[str]:
    """The names of a module's own parameters, or of all parameters of the nearest enclosing module that has any."""
    names = {name for name, _ in module.get_submodule(prefix).named_parameters(prefix, recurse=False)}
    while not names and prefix:
        prefix = prefix.rpartition(".")[0]
        names = {name for name, _ in module.get_submodule(prefix).named_parameters(prefix)}
    return names


def _matches(pattern: str | re.Pattern[str], name: str) -> bool:
    return fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.search(name) is not None
