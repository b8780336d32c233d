"""Models at work: calling one with a batch's arguments, in evaluation mode without gradients, and its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["apply", "call", "check_logits", "device_of", "evaluating", "logits_of", "move"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off, batch norm frozen; each submodule's own flag comes back afterwards, whatever has happened."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        if modules:
            model.eval()
        yield
    finally:
        for module, training in zip(modules, flags, strict=True):
            module.training = training


def apply(model: Callable[..., Any], arguments: Any) -> Any:
    """``model`` of a mapping's keywords, a tuple's positions, or one argument."""
    if isinstance(arguments, Mapping):
        return model(**arguments)
    return model(*arguments) if isinstance(arguments, tuple) else model(arguments)


def call(model: Callable[..., Any], arguments: Any) -> Any:
    """The same without gradients.

    ``no_grad`` and not ``inference_mode``, whose tensors could not be used under autograd by a caller's functions.
    """
    with torch.inference_mode(False), torch.no_grad():
        return apply(model, arguments)


def logits_of(output: Any) -> Any:
    """The logits of what a model returns: a tensor, or something that has ``logits``.

    Raises:
        TypeError: neither.
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    raise TypeError(
        f"the teacher returned a {type(output).__name__} without logits: say by outputs=(lambda output, batch: ...) "
        "where its logits are"
    )


def device_of(model: Any) -> torch.device | None:
    """Where a module's weights are; None for a callable, or a module without weights."""
    weights = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return weights[0].device if weights else None


def move(value: Any, device: torch.device | None) -> Any:
    """The tensors in a tensor, tuple or mapping on ``device``."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: move(item, device) for name, item in value.items()}
    return tuple(move(item, device) for item in value) if isinstance(value, tuple) else value


def check_logits(name: str, x: object) -> Tensor:
    """``x``, where it is (..., vocabulary) logits. Raises ``TypeError`` or ``ValueError`` under ``name`` otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of logits, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16 logits, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{name} must be (..., vocabulary), got a scalar")
    if x.shape[-1] < 1:
        raise ValueError(f"{name} must have a vocabulary of at least 1, got shape {tuple(x.shape)}")
    return x
