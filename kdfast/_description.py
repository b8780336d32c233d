"""Descriptions of values in words on which two processes agree: they tell whether two runs are the same one."""

from __future__ import annotations

import dis
import io
import platform
import re
import sys
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdfast._version import __version__

__all__ = ["MOVES", "Description", "differences", "of_library", "slots_of"]

DEPTH = 10  # of values within values
SHOWN = 60  # characters of a text, and items of a list, that are kept as they are
SAMPLED, SUMMED = 33, 10_000  # items of a long list that are described one by one, and that go into a checksum
TEXTS = 5_000_000  # items of a list of texts and numbers that count
WHOLE, PART = 2**20, 2**16  # bytes of a tensor that go into its checksum, and elements that do of a larger one
ADDED = 2**30  # bytes of larger tensors, of one description, whose every element counts: in sums
SIDE = 4096  # elements of a larger tensor in each sum
ENTRIES = 400  # more than these become digests

MOVES = "changes while it runs"  # the text of what is no option, but a state

_INTERNAL = set(vars(nn.Module())) | {"gradient_checkpointing"}
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu)(:\d+)?")
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?|-?inf|nan")


class Description:
    """A description that grows value by value: texts by the values' paths, such as ``objective.temperature``.

    Functions are described by their names, code, defaults, and the variables that they use from outside; objects by
    their class and attributes; tensors and arrays by their shape and a checksum, large ones by that of a sample; models
    by their parts, and by their weights unless a checkpoint restores those. Objects of other libraries are described by
    their ``repr``, if it holds no address.

    Args:
        restored: models that a checkpoint restores. Their weights may be any.
        values: False leaves the checksums of tensors and arrays out, which take the time.
    """

    def __init__(self, restored: Iterable[Any] = (), *, values: bool = True) -> None:
        self._values, self._left = values, [ADDED]
        self.entries: dict[str, str] = {}
        self._seen: dict[int, tuple[str, Any]] = {}  # keeps the objects, so that no other one gets their id
        self._restored = {id(x) for model in restored for x in _tensors_of(model)}

    def add(self, path: str, value: Any, *, data: bool = False, depth: int = 0) -> None:
        """Describe ``value``, and what is in it, under ``path``.

        Args:
            path: where it is.
            value: anything.
            data: it is data: an object's code and its state, such as an open file, do not count.
            depth: how many values it lies within.
        """
        text = _simple(value)
        if text is not None:
            self.entries[path] = text
        elif isinstance(value, (Tensor, np.ndarray)):
            self.entries[path] = "restored" if id(value) in self._restored else self._array(value)
        elif depth >= DEPTH:
            self.entries[path] = _name(type(value))
        elif id(value) in self._seen:
            self.entries[path] = f"the same as {self._seen[id(value)][0]}"
        else:
            self._seen[id(value)] = path, value
            self._add_compound(path, value, data, depth + 1)

    def _add_compound(self, path: str, value: Any, data: bool, depth: int) -> None:
        if isinstance(value, Mapping):
            self.entries[path] = f"{_name(type(value))} of {len(value)}"
            if self._values and len(value) > SAMPLED:
                keys, items = (self._checksum(list(x), data, depth) for x in (value.keys(), value.values()))
                self.entries[f"{path}.items"] = f"checksum {keys} {items}"
            for key, item in _sample(list(value.items())):
                self.add(f"{path}.{_simple(key) or _name(type(key))}", item, data=data, depth=depth)
        elif isinstance(value, (list, tuple, set, frozenset, range)):
            self._add_items(path, value, data, depth)
        elif isinstance(value, partial):
            self.add(path, value.func, data=data, depth=depth)
            self._add_each(path, {**dict(enumerate(value.args)), **value.keywords}, data, depth)
        elif isinstance(value, types.MethodType):
            self.entries[path] = value.__func__.__qualname__
            self.add(f"{path}.function", value.__func__, data=data, depth=depth)
            self.add(f"{path}.self", value.__self__, data=data, depth=depth)
        elif isinstance(value, types.FunctionType):
            self._add_function(path, value, data, depth)
        elif isinstance(value, nn.Module):
            self.add_module(path, value, data=data, depth=depth)
        else:
            self._add_object(path, value, data, depth)

    def _add_items(self, path: str, value: Any, data: bool, depth: int) -> None:
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        if all(_simple(item) is not None for item in _sample(items)) and None not in (
            texts := [_simple(item) for item in _sample(items, TEXTS if self._values else SAMPLED)]
        ):
            joined = ", ".join(map(str, texts))
            kept = f"({joined})" if len(joined) <= SHOWN else f"{len(items)} of checksum {_digest(joined)}"
            self.entries[path] = kept
            return
        self.entries[path] = f"{len(items)} items"
        if self._values and len(items) > SAMPLED:
            self.entries[f"{path}.items"] = f"checksum {self._checksum(items, data, depth)}"
        for number in _sample(range(len(items))):
            self.add(f"{path}[{number}]", items[number], data=data, depth=depth)

    def _checksum(self, items: Any, data: bool, depth: int) -> str:
        """Of many items, more than are described one by one."""
        found = Description()
        found._restored, found._left = self._restored, self._left
        if None not in (texts := [_simple(item) for item in _sample(items, TEXTS)]):
            return _digest(", ".join(map(str, texts)))
        for number, item in enumerate(_sample(items, SUMMED)):
            found.add(f"{number}", item, data=data, depth=depth)
        return _digest(" ".join(f"{path} {text}" for path, text in found.entries.items()))

    def _add_each(self, path: str, values: Mapping[Any, Any], data: bool, depth: int) -> None:
        for name, value in values.items():
            self.add(f"{path}.{name}", value, data=data, depth=depth)

    def _add_function(self, path: str, function: types.FunctionType, data: bool, depth: int) -> None:
        self.entries[path] = _name(function)
        if of_library(function.__module__):
            return
        self.entries[f"{path}.code"] = _code_text(function.__module__, [function])
        defaults = function.__defaults__ or ()
        names = function.__code__.co_varnames[: function.__code__.co_argcount][-len(defaults) or None :]
        self._add_each(path, dict(zip(names, defaults, strict=False)), data, depth)
        self._add_each(path, function.__kwdefaults__ or {}, data, depth)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell
                self.add(f"{path}.{name}", cell.cell_contents, data=data, depth=depth)
        if not _is_ours(function.__module__):
            self._add_each(path, _globals(function), data, depth)

    def add_module(self, path: str, module: nn.Module, *, data: bool = False, depth: int = 0) -> None:
        """Describe a model: its parts with their attributes, and its weights unless they are restored."""
        module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
        for name, part in module.named_modules():
            self._seen.setdefault(id(part), (path, part))
            place = f"{path}.{name}" if name else path
            self.entries[place] = _name(type(part))
            library = of_library(type(part).__module__)
            for attribute, value in sorted(vars(part).items()):
                text = _simple(value)
                if attribute in _INTERNAL or (library and (attribute.startswith("_") or text is None)):
                    continue
                self.add(f"{place}.{attribute}", value, data=data, depth=depth + 1)
            if not library:
                self._add_code(place, type(part), data, depth + 1)
        shapes = [f"{name} {x.dtype} {tuple(x.shape)}" for name, x in _named_tensors(module)]
        self.entries[f"{path}.shapes"] = f"{len(shapes)} tensors of checksum {_digest(' '.join(shapes))}"
        weights = [(name, x) for name, x in _named_tensors(module) if id(x) not in self._restored]
        if weights:
            texts = [f"{name} {self._array(x)}" for name, x in weights]
            self.entries[f"{path}.weights"] = f"{len(weights)} tensors of checksum {_digest(' '.join(texts))}"

    def _array(self, array: Any) -> str:
        if not self._values:
            return str(tuple(array.shape))
        size = array.numel() * array.element_size() if isinstance(array, Tensor) else array.nbytes
        if size <= WHOLE or size > self._left[0]:
            return _array(array)
        self._left[0] -= size
        return _array(array) + _sums(array)

    def _add_object(self, path: str, value: Any, data: bool, depth: int) -> None:
        kind = type(value)
        fingerprint = getattr(value, "_fingerprint", None)  # of a cache, or of a dataset of Hugging Face
        if isinstance(fingerprint, (str, bytes)):
            text = fingerprint if isinstance(fingerprint, str) else fingerprint.hex()
            self.entries[path] = f"{_name(kind)} {text}"
            return
        if isinstance(value, torch.Generator):
            self.entries[path] = f"generator of seed {value.initial_seed()}"
            return
        dataset = isinstance(value, torch.utils.data.Dataset)
        if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            self.entries[path] = _name(value) if not isinstance(value, types.ModuleType) else value.__name__
            return
        if of_library(kind.__module__) and not dataset:
            self.entries[path] = _shown(value)
            if callable(getattr(value, "__wrapped__", None)):
                self.add(f"{path}.wrapped", value.__wrapped__, data=data, depth=depth)
            return
        self.entries[path] = _name(kind)
        if _is_ours(kind.__module__) and hasattr(value, "described"):
            self._add_each(path, value.described(), data, depth)
            return
        if callable(value) or dataset:
            self._add_code(path, kind, data, depth)
        self._add_each(path, _attributes(value, data), data, depth)

    def _add_code(self, path: str, kind: type, data: bool, depth: int) -> None:
        """The code of a class that is neither ours nor a library's, its settings, and the variables that it uses."""
        if id(kind) in self._seen:
            self.entries[f"{path}.class"] = _name(kind)
            return
        self._seen[id(kind)] = path, kind
        classes = [x for x in kind.__mro__ if not (of_library(x.__module__) or _is_ours(x.__module__) or x is object)]
        members = [member for each in classes for _, member in sorted(vars(each).items())]
        functions = [x for x in members if isinstance(x, types.FunctionType)]
        if functions:
            self.entries[f"{path}.code"] = _code_text(kind.__module__, functions)
        settings = {name: x for each in reversed(classes) for name, x in vars(each).items() if _is_setting(name, x)}
        used = {name: x for function in functions for name, x in _globals(function).items()}
        self._add_each(path, {**used, **settings}, data, depth)

    def mark_moving(self, before: Description, after: Description) -> None:
        """Mark what differs between two descriptions of one run as what changes while it runs: that is no option."""
        for path in differences(before.entries, after.entries):
            self.entries[path] = MOVES

    def let_go(self) -> None:
        """Forget the objects. Nothing can be added after that."""
        self._seen = {}

    def folded(self) -> dict[str, str]:
        """The entries; where there are very many, digests of the parts that have most of them."""
        found = self.entries
        for parts in (6, 5, 4, 3, 2):
            if len(found) <= ENTRIES:
                break
            groups: dict[str, dict[str, str]] = {}
            for path, text in self.entries.items():
                groups.setdefault(".".join(path.split(".")[:parts]), {})[path] = text
            found = {}
            for path, texts in groups.items():
                joined = " ".join(f"{each} {texts[each]}" for each in sorted(texts))
                found |= texts if len(texts) == 1 else {path: f"checksum {_digest(joined)}"}
        return found


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The paths whose texts differ, with both texts: "nothing" where there is none. What lies below one is left out.

    What has been found to change while it runs is no difference. Numbers are compared as numbers. Code is compared
    where both were compiled by the same versions.
    """
    found: dict[str, tuple[str, str]] = {}
    moving = [path for texts in (then, now) for path, text in texts.items() if text == MOVES]
    for path in dict.fromkeys([*now, *then]):
        old, new = then.get(path, "nothing"), now.get(path, "nothing")
        if _same(old, new) or path in moving:
            continue
        if any(path.startswith((f"{above}.", f"{above}[")) for above in (*found, *moving)):
            continue
        found[path] = old, new
    return found


def _same(old: str, new: str) -> bool:
    if old == new:
        return True
    if _NUMBER.fullmatch(old) and _NUMBER.fullmatch(new):
        return float(old) == float(new)
    codes = old.startswith("code of ") and new.startswith("code of ")
    return codes and old.rpartition(":")[0] != new.rpartition(":")[0]


# ---- texts ----------------------------------------------------------------------------------------------------------


def _simple(value: Any) -> str | None:
    """The text of a value that has no parts; None for another."""
    if isinstance(value, torch.device) or (isinstance(value, str) and _DEVICE.fullmatch(value)):
        return "a device"  # another one may go on
    if isinstance(value, str):
        return repr(str(value)) if len(value) <= SHOWN else f"text of checksum {_digest(value)}"
    if value is None or isinstance(value, (bool, int, float, complex)):
        # Subclasses, such as an enum's members, have texts of their own.
        return repr(value) if type(value) in (type(None), bool, int, float, complex) else _shown(value)
    if isinstance(value, (torch.dtype, torch.Size, np.dtype, np.generic)):
        return str(value)
    return _name(value) if isinstance(value, type) else None


def _shown(value: Any) -> str:
    """An object's ``repr``, or its digest if it is long; the name of its class where the text has an address."""
    try:
        text = repr(value)
    except Exception:  # of any class of any library
        return _name(type(value))
    if " at 0x" in text or isinstance(value, io.IOBase):
        return _name(type(value))
    return text if len(text) <= SHOWN else f"{_name(type(value))} of checksum {_digest(text)}"


def _name(kind: Any) -> str:
    name = getattr(kind, "__qualname__", str(kind))
    module = getattr(kind, "__module__", None)
    # One's own module has another name as a script than when it is imported.
    return f"{module}.{name}" if of_library(module) and module != "builtins" else name


def _array(array: Any) -> str:
    """Dtype, shape, and the values: themselves if they are few, else a checksum, of a large array that of a sample."""
    tensor = array if isinstance(array, Tensor) else None
    about = f"{str(array.dtype).removeprefix('torch.')} {tuple(array.shape)}"
    try:
        if tensor is None:
            flat: Any = np.asarray(array).reshape(-1)
            flat = flat if array.nbytes <= WHOLE else flat[:: -(-len(flat) // PART)]
            content = repr(flat.tolist()).encode() if flat.dtype.hasobject else np.ascontiguousarray(flat).tobytes()
        else:
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            values = local.detach().reshape(-1)
            whole = values.numel() * values.element_size() <= WHOLE
            values = values if whole else values[:: -(-values.numel() // PART)]
            content = values.contiguous().view(torch.uint8).cpu().numpy().tobytes()
            flat = values.cpu()
        if len(flat) <= 8 and not about.startswith("object"):
            return f"{about} {flat.tolist()}"
        return f"{about} of checksum {_digest(content)}"
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # on the meta device, sparse, quantised
        return about


def _sums(array: Any) -> str:
    """A checksum in which every element of a large array counts: of sums, which are quick to make on any device."""
    tensor = isinstance(array, Tensor)
    if isinstance(array, np.memmap) or isinstance(getattr(array, "base", None), np.memmap):
        return ""  # reading all of it may take long
    try:
        if tensor:
            flat: Any = (array.to_local() if hasattr(array, "to_local") else array).detach().reshape(-1)
            flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
            kinds: Any = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            flat = flat.contiguous().view(kinds[flat.element_size()])
        else:
            flat = np.ascontiguousarray(array).reshape(-1)
            flat = flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat
            flat = flat.view({1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}[flat.itemsize])
        square = flat[: len(flat) // SIDE * SIDE].reshape(-1, SIDE)
        whole: Any = torch.int64 if tensor else np.int64
        sums = [square.sum(0, dtype=whole), square.sum(1, dtype=whole), flat[len(square) * SIDE :]]
        return f" and sums {_digest(b''.join((x.cpu().numpy() if tensor else x).tobytes() for x in sums))}"
    except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError):  # on the meta device, objects
        return ""


def _digest(content: str | bytes) -> str:
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return blake2b(content, digest_size=8).hexdigest()


def _sample(items: Any, count: int = SAMPLED) -> list[Any]:
    """Up to ``count`` of the items, evenly spread, with the first and the last."""
    if len(items) <= count:  # by position: a loader may be a list whose iteration does more
        return [items[i] for i in range(len(items))]
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


# ---- code -----------------------------------------------------------------------------------------------------------


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == "kdfast"


def of_library(module: str | None) -> bool:
    """Whether a module is of Python or of an installed package, other than this one."""
    if module is None or _is_ours(module) or module == "__main__":
        return False
    if module.split(".")[0] in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _code_text(module: str, functions: Iterable[types.FunctionType]) -> str:
    version = f", kdfast {__version__}" if _is_ours(module) else ""
    content = " ".join(_code(function.__code__, function.__doc__) for function in functions)
    return f"code of Python {platform.python_version()}{version}: {_digest(content)}"


def _code(code: types.CodeType, doc: str | None) -> str:
    """What code does: its instructions, names and constants, without its docstring and its place in a file."""
    constants = [
        _code(x, None)
        if isinstance(x, types.CodeType)
        else repr(sorted(x, key=repr) if isinstance(x, frozenset) else x)
        for x in code.co_consts
        if x is not doc or doc is None
    ]
    return " ".join([code.co_code.hex(), *code.co_names, *code.co_varnames, *code.co_freevars, *constants])


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The variables of its module that a function uses; of modules and classes, the settings that it looks up."""
    names: set[str] = set()
    attributes: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names |= {str(x.argval) for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        attributes |= set(code.co_names)
        codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    own = [x for x in found.values() if _holds_settings(x)]
    looked_up = {f"{x.__name__}.{name}": vars(x)[name] for x in own for name in sorted(attributes) if name in vars(x)}
    found |= {name: x for name, x in looked_up.items() if _is_setting(name.rpartition(".")[2], x)}
    return {name: x for name, x in found.items() if not isinstance(x, (type, types.ModuleType))}


def _holds_settings(value: Any) -> bool:
    """Whether a value is a file or class of one's own, whose variables a function may use by their names."""
    if isinstance(value, types.ModuleType):
        return not (of_library(value.__name__) or _is_ours(value.__name__) or value.__name__ == "__main__")
    return isinstance(value, type) and not (of_library(value.__module__) or _is_ours(value.__module__))


def _is_setting(name: str, value: Any) -> bool:
    """Whether a variable of a file or class is a number, a text, or a list or mapping of these."""
    if name.startswith("__"):
        return False
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return all(_simple(item) is not None and not isinstance(item, type) for item in items)


# ---- objects --------------------------------------------------------------------------------------------------------


def _attributes(value: Any, data: bool) -> dict[str, Any]:
    """An object's attributes, without those that its ``state_dict`` has.

    Of data these are not what is opened, or remembered of what was read (a mapping with a private name), on the way.
    """
    found = dict(sorted(vars(value).items())) if hasattr(value, "__dict__") else {}
    found |= {name: getattr(value, name) for name in slots_of(value)}
    if is_dataclass(value):
        found |= {field.name: getattr(value, field.name) for field in fields(value)}
    kept = [name for name in found if isinstance(getattr(type(value), name, None), cached_property)]
    found = {name: x for name, x in found.items() if name not in kept}
    if hasattr(value, "state_dict"):
        held = value.state_dict()
        found = {name: x for name, x in found.items() if not (isinstance(held, Mapping) and name in held)}
    if not data or _is_ours(type(value).__module__):
        return found
    return {
        name: x
        for name, x in found.items()
        if x is not None and not (name.startswith("_") and isinstance(x, Mapping)) and not _is_opaque(x)
    }


def slots_of(value: Any) -> list[str]:
    """The names of an object's slots that have a value; a class may give the name of its only one as a string."""
    given = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for some in given for name in ([some] if isinstance(some, str) else some)]
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def _is_opaque(value: Any) -> bool:
    """Whether a value is an object of a library that says nothing of itself, such as an open file."""
    functions = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, partial, type)
    told = (Tensor, np.ndarray, torch.Generator, Mapping, list, tuple, set, frozenset)
    if isinstance(value, (*functions, *told, torch.utils.data.Dataset, nn.Module)):
        return False
    kind = type(value)
    return of_library(kind.__module__) and _simple(value) is None and _shown(value) == _name(kind)


def _tensors_of(model: Any) -> list[Tensor]:
    return [x for _, x in _named_tensors(model)] if isinstance(model, nn.Module) else []


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
