"""Layer dropping: a student that is its teacher without some of the layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import nn

__all__ = ["drop_layers"]

# What transformers' modules call a layer's own number, and how many there are.
_POSITIONS = ("layer_idx", "layer_id", "layer_number", "layer_num")
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_UNBUILT = (*_POSITIONS, *_COUNTS, "training", "gradient_checkpointing")  # what a layer's configuration does not say


@dataclass(frozen=True)
class _Stack:
    """A list of layers, its name within the model, and the configuration that counts it, if one does."""

    name: str
    layers: nn.ModuleList
    config: Any


def drop_layers(model: nn.Module, drop: Iterable[int], *, layers: str | None = None) -> list[str]:
    """Take whole layers out of a model, which leaves a shallower student near its teacher::

        student = copy.deepcopy(teacher)
        drop_layers(student, [10, 14, 18])
        options = {"temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0}
        Distiller(student, teacher, lr=1e-4, **options).fit(loader, epochs=1)

    Those that stay keep their weights and order. Their ``layer_idx``, by which a cache of keys and values finds them,
    counts anew; the configuration gets the new number of layers, and its lists with an item per layer (such as
    ``layer_types``) lose those of the dropped ones, so that the student can be saved and loaded. The configuration is a
    copy: a model that shares the old one stays as it is.

    Args:
        model: a decoder or encoder of transformers, or any module with a stack of layers. It is changed in place.
        drop: which layers, counted from 0; negative ones from the end.
        layers: the name of the stack within ``model``, an ``nn.ModuleList``. By default the one that has as many layers
            as the configuration says, or without a configuration the only one.

    Returns:
        The names that the dropped layers had.

    Raises:
        TypeError: ``model`` is no module, ``layers`` names no ``nn.ModuleList``, or a layer's number is no integer.
        ValueError: no stack or several fit; ``drop`` is empty, names a layer twice or one that is not there, or leaves
            none; the model is an encoder-decoder; or its configuration would make other layers of those that are kept,
            where their kinds follow from their numbers. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder, which one configuration counts: drop "
            "layers of a decoder-only or encoder-only model"
        )
    stack = _find(model, layers)
    dropped = _numbers(drop, stack)
    kept = [i for i in range(len(stack.layers)) if i not in dropped]
    configs = _configs(model, stack, kept)
    _check_loads(model, stack, kept, configs)

    for module in model.modules():
        if id(getattr(module, "config", None)) in configs:
            module.config = configs[id(module.config)]
    for new, old in enumerate(kept):
        for module in stack.layers[old].modules():
            _renumber(module, _POSITIONS, old, new)
    for name, module in model.named_modules():
        if not name or f"{stack.name}.".startswith(f"{name}.") or name.startswith(f"{stack.name}."):
            _renumber(module, _COUNTS, len(stack.layers), len(kept))
    for i in sorted(dropped, reverse=True):
        del stack.layers[i]
    return [f"{stack.name}.{i}" for i in sorted(dropped)]


def _renumber(module: nn.Module, names: Sequence[str], old: int, new: int) -> None:
    for name in names:
        if type(module.__dict__.get(name)) is int and module.__dict__[name] == old:
            setattr(module, name, new)


def _find(model: nn.Module, name: str | None) -> _Stack:
    owners = {name: module for name, module in model.named_modules() if _count(module) is not None}
    stacks = [
        _Stack(found, module, _owner(owners, found, len(module)))
        for found, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and found
    ]
    if name is not None:
        named = [stack for stack in stacks if stack.name == name]
        if not named:
            raise TypeError(f"layers must name an nn.ModuleList, got {name!r}; there are {_listed(stacks)}")
        return named[0]
    counted = [stack for stack in stacks if stack.config is not None] if owners else stacks
    outer = [x for x in counted if not any(x.name.startswith(f"{other.name}.") for other in counted)]
    if len(outer) != 1:
        what = "none" if not outer else f"{len(outer)} ({_listed(outer)})"
        raise ValueError(f"of {_listed(stacks)}, {what} can be the stack of layers: name it by layers=...")
    return outer[0]


def _count(module: nn.Module) -> int | None:
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _owner(owners: dict[str, nn.Module], name: str, count: int) -> Any:
    """The configuration of the innermost module around ``name`` that has one, if it counts so many layers."""
    around = [owner for owner in owners if not owner or name.startswith(f"{owner}.")]
    inner = owners[max(around, key=len)] if around else None
    return inner.config if inner is not None and _count(inner) == count else None


def _listed(stacks: Sequence[_Stack]) -> str:
    return ", ".join(f"{stack.name} of {len(stack.layers)}" for stack in stacks) or "no nn.ModuleList"


def _numbers(drop: Iterable[int], stack: _Stack) -> set[int]:
    count = len(stack.layers)
    asked = [drop] if isinstance(drop, int) else list(drop)
    numbers = [index(i) for i in asked]  # TypeError for what is no integer
    if not numbers:
        raise ValueError(f"drop names no layer of {stack.name}, which has {count}")
    if not all(-count <= i < count for i in numbers):
        raise ValueError(f"{stack.name} has the layers 0 ... {count - 1}, got {asked}")
    found = {i % count for i in numbers}
    if len(found) < len(numbers):
        raise ValueError(f"drop names a layer of {stack.name} twice: {asked}")
    if len(found) == count:
        raise ValueError(f"drop names all {count} layers of {stack.name}: at least one must stay")
    return found


# ---- configurations -------------------------------------------------------------------------------------------------


def _configs(model: nn.Module, stack: _Stack, kept: list[int]) -> dict[int, Any]:
    """Copies of the modules' configurations for the shallower model, by the ids of the old ones."""
    if stack.config is None:
        return {}
    memo: dict[int, Any] = {}
    held = [module.config for module in model.modules() if hasattr(module, "config")]
    copies: dict[int, Any] = {id(config): copy.deepcopy(config, memo) for config in held}
    new, count = copies[id(stack.config)], len(stack.layers)
    new.num_hidden_layers = len(kept)
    for field, value in list(vars(new).items()):
        if isinstance(value, (list, tuple)) and len(value) == count:
            numbers = list(value) == list(range(count))  # of all layers, as Llama 4's that are mixtures
            setattr(new, field, type(value)(range(len(kept)) if numbers else (value[i] for i in kept)))
    return copies


def _check_loads(model: nn.Module, stack: _Stack, kept: list[int], configs: dict[int, Any]) -> None:
    """Raise ``ValueError`` where the new configuration would make other layers than those that are kept.

    Only what differs between layers is looked at: adapters and the like are not the configuration's.
    """
    around = ((name, module) for name, module in model.named_modules() if hasattr(type(module), "config_class"))
    outer, whole = next((x for x in around if not x[0] or stack.name.startswith(f"{x[0]}.")), ("", None))
    if not configs or whole is None:
        return
    with torch.device("meta"):
        made = type(whole)(configs[id(whole.config)]).get_submodule(stack.name[len(outer) :].removeprefix("."))
    old, new = [_plan(stack.layers[i]) for i in kept], [_plan(layer) for layer in made.children()]
    keys = {key for plan in (*old, *new) for key in plan}
    differing = [key for key in sorted(keys) if any(_differ(key, plans) for plans in (old, new))]
    for number, was, loaded in zip(kept, old, new, strict=True):
        for key in differing:
            if key in loaded and loaded[key] != was.get(key):
                raise ValueError(
                    f"the configuration does not say layer by layer what differs between them: of {stack.name}."
                    f"{number}, {key} is {was.get(key)}, and would be {loaded[key]} once the student is loaded again. "
                    "Drop layers at another place, or whole periods of the pattern"
                )


def _differ(key: str, plans: list[dict[str, Any]]) -> bool:
    return any(plan.get(key) != plans[0].get(key) for plan in plans)


def _plan(layer: nn.Module) -> dict[str, Any]:
    """What a layer is built as: shapes of its tensors, and its modules' plain attributes."""
    plan: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    for name, module in layer.named_modules():
        for field, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and field not in _UNBUILT and not field.startswith("_"):
                plan[f"{name}.{field}"] = value
    return plan
