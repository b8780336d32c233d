"""What a loss keeps for its backward pass, where autograd sees it.

Tensors that an object holds beside ``save_for_backward`` live as long as the loss, change without an error, and no hook
that saves memory meets them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from kdfast.loss.derivatives import saveable

__all__ = ["save", "saved"]

Rebuild = Callable[[Sequence[Tensor]], Any]


def save(ctx: Any, *values: Any) -> None:
    """Keep values for a backward pass: tensors, and named tuples and dataclasses of them, however deep."""
    tensors: list[Tensor] = []
    ctx.rebuild = [_taken_apart(value, tensors) for value in values]
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> list[Any]:
    """The values that ``save`` was given. Their tensors are as ``ctx.saved_tensors`` gives them."""
    tensors = ctx.saved_tensors
    return [rebuild(tensors) for rebuild in ctx.rebuild]


def _taken_apart(value: Any, tensors: list[Tensor]) -> Rebuild:
    """Move the tensors of ``value`` to ``tensors``; what is returned makes another such value of them."""
    if isinstance(value, Tensor):
        place = len(tensors)
        tensors.append(saveable(value))
        return lambda given: given[place]
    before, kind = len(tensors), type(value)
    parts = {name: _taken_apart(getattr(value, name), tensors) for name in _fields(value)}
    if len(tensors) == before:
        return lambda given: value
    return lambda given: kind(**{name: part(given) for name, part in parts.items()})


def _fields(value: Any) -> Sequence[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return getattr(value, "_fields", ())  # of a named tuple
