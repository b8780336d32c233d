"""The modules that a model consists of, also one that is a function, and evaluation mode for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["evaluating", "modules_in"]

_DEPTH = 6  # of functions in functions


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A context in which ``model`` is in evaluation mode. Each submodule gets its flag back, also after an error.

    A function may be a model, too: the modules that it uses are found, see ``modules_in``.
    """
    found = modules_in(model)
    modules = list({id(module): module for outer in found for module in outer.modules()}.values())
    flags = [module.training for module in modules]
    try:
        for module in found:
            module.eval()
        yield
    finally:
        for module, training in zip(modules, flags, strict=True):
            module.training = training


def modules_in(model: Any) -> list[nn.Module]:
    """The modules that a model consists of: itself, or those that a function uses.

    Of a function these are what its closure, defaults and globals hold; of a method, its object's; of a ``partial``,
    its function's and arguments'; of another object, its attributes'.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [(model, 0)]
    while waiting:
        item, depth = waiting.pop()
        if id(item) in seen or depth > _DEPTH:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        else:
            waiting += [(part, depth + 1) for part in _parts_of(item)]
    return list(found.values())


def _parts_of(item: Any) -> list[Any]:
    """What a function or object uses, as far as a module could be there."""
    if isinstance(item, MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
        named = [item.__globals__[name] for name in _names_in(item.__code__) if name in item.__globals__]
        inner = [getattr(item, "__wrapped__", None)]
        held = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values(), *cells, *inner]
        return [*held, *(x for x in named if isinstance(x, nn.Module) or _is_users_own(x))]
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, (list, tuple)):
        return list(item)
    return list(vars(item).values()) if _is_users_own(item) else []


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is not bound yet
        return False
    return True


def _names_in(code: CodeType) -> set[str]:
    """The names that a function's code and that of the functions inside it look up."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _is_users_own(item: Any) -> bool:
    """Whether something is a function or a callable object that may hold a model, and no class, tensor or library's."""
    if isinstance(item, (type, Tensor)) or not callable(item) or not hasattr(item, "__dict__"):
        return False
    module = getattr(item, "__module__", None) or type(item).__module__
    return not str(module).startswith(("torch.", "kdfast.", "numpy", "builtins"))
