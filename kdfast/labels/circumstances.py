"""What a model's treatment of its logits may depend on: numbers that somebody may change between two calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from kdfast.labels.tail import numbers

__all__ = ["circumstances", "path_of"]


def path_of(model: nn.Module, module: nn.Module) -> str | None:
    """The name of a module within a model; None if it is in none of its parts."""
    return next((name for name, part in model.named_modules() if part is module), None)


def circumstances(model: nn.Module, path: str | None, arguments: Iterable[Any]) -> tuple[Any, ...]:
    """What a call of ``model`` may make of its logits, so far as that shows without running it. It waits for nothing.

    These are, of the modules that contain the output layer and of their direct parts, the mode, the numbers, functions
    and buffers; the numbers of their configurations; and the call's own numbers and texts.

    Args:
        model: the model as it is called.
        path: the output layer's name within it.
        arguments: what it is called with: positions, and pairs of a name and a value.
    """
    above = [model]
    for name in (path or "").split(".")[:-1]:
        above.append(above[-1]._modules[name])  # type: ignore[arg-type]
    parts = {id(part): part for module in above for part in (module, *module.children())}
    configs = {id(x): x for x in (getattr(module, "config", None) for module in above) if x is not None}
    given = [x for x in arguments if not isinstance(x[1] if isinstance(x, tuple) and len(x) == 2 else x, Tensor)]
    return (
        tuple(_state(part) for part in parts.values()),
        tuple(tuple(numbers(config)) for config in configs.values()),
        tuple(repr(x) for x in given if _is_plain(x[1] if isinstance(x, tuple) and len(x) == 2 else x)),
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _state(module: nn.Module) -> tuple[Any, ...]:
    own = vars(module).items()
    plain = [(name, x if _is_plain(x) else id(x)) for name, x in own if _is_plain(x) or callable(x)]
    buffers = [(id(x), 0 if x.is_inference() else x._version) for x in module._buffers.values() if x is not None]
    return id(module), tuple(plain), tuple(buffers)
