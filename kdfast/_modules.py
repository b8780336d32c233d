"""The modules that a model consists of, also one that is a function, and evaluation mode for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["evaluating", "modules_in"]

# How far a search goes: functions in functions, items of a container, and objects in all.
_DEPTH, _LONGEST, _MOST = 6, 256, 10_000
_LIBRARIES = ("torch", "kdfast", "numpy", "builtins")


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
    its function's and arguments'; of another object, its attributes'. A module may also hold some in a list, out of
    sight of its own ``eval``.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [(model, 0)]
    while waiting and len(seen) < _MOST:
        item, depth = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        if depth < _DEPTH:
            waiting += [(part, depth + 1) for part in _parts_of(item)]
    return list(found.values())


def _parts_of(item: Any) -> list[Any]:
    """What a function or object uses, as far as a module could be there."""
    if isinstance(item, nn.Module):
        own = [x for name, x in vars(item).items() if not name.startswith("_")]
        return [x for x in own if isinstance(x, (list, tuple, dict, FunctionType, partial))]
    if isinstance(item, MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
        held = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values(), *cells, *_globals_of(item)]
        return [*held, getattr(item, "__wrapped__", None)]
    if isinstance(item, Mapping):
        return list(islice(item.values(), _LONGEST))
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        return list(islice(item, _LONGEST))
    return [getattr(item, "__wrapped__", None), *vars(item).values()] if _is_users_own(item) else []


def _globals_of(function: FunctionType) -> list[Any]:
    names = _names_in(function.__code__)
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    files = [x for x in found if isinstance(x, ModuleType)]
    inside = [vars(file)[name] for file in files for name in names if name in vars(file)]
    return [*found, *(x for x in inside if isinstance(x, nn.Module))]


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
    """Whether something is an object that may hold a model: no class, file or tensor, and of no library."""
    if isinstance(item, (type, ModuleType, Tensor)) or not hasattr(item, "__dict__"):
        return False
    return type(item).__module__.partition(".")[0] not in _LIBRARIES or hasattr(item, "__wrapped__")
