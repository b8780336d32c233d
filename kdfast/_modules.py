"""The modules that a model consists of, also one that is a function, and evaluation mode for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

from torch import Tensor, nn

from kdfast._description import of_library, slots_of

__all__ = ["evaluating", "modules_in"]

# How far a search goes: functions in functions, items of a container, and objects in all.
_DEPTH, _LONGEST, _MOST = 6, 256, 10_000
_INTERNAL = set(vars(nn.Module()))  # of its parts a module takes care itself
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
        own = [x for name, x in vars(item).items() if name not in _INTERNAL]
        kinds = (nn.Module, list, tuple, dict, FunctionType, MethodType, partial)
        return [x for x in own if isinstance(x, kinds) or (_is_users_own(x) and not of_library(type(x).__module__))]
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
    if isinstance(item, ReferenceType):
        return [item()]
    if isinstance(item, (staticmethod, classmethod)):
        return [item.__func__]
    if isinstance(item, (property, cached_property)):
        return [item.fget if isinstance(item, property) else item.func]
    if isinstance(item, type):
        # Of an installed package's class the functions use that package.
        return [] if of_library(item.__module__) or _is_librarys(item) else list(vars(item).values())
    return _parts_of_object(item) if _is_users_own(item) else []


def _parts_of_object(item: Any) -> list[Any]:
    own = [*getattr(item, "__dict__", {}).values(), *(getattr(item, name) for name in slots_of(item))]
    return [getattr(item, "__wrapped__", None), *own, *type(item).__mro__]


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
    if isinstance(item, (type, ModuleType, Tensor)):
        return False
    return not _is_librarys(type(item)) or hasattr(item, "__wrapped__")


def _is_librarys(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES
