"""Calling models: a batch's arguments, evaluation mode without gradients, and the logits of an output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._record_keys import NON_MODEL_FIELDS, record_keys

__all__ = [
    "NON_MODEL_FIELDS",
    "BatchFields",
    "apply",
    "call",
    "check_logits",
    "device_of",
    "evaluating",
    "logits_of",
    "move",
]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BatchFields:
    """Where a batch has a model's arguments and its records' keys: functions of the batch, or None for the convention.

    Args:
        inputs: the model's argument, tuple of arguments, or mapping of keywords. By default a mapping's fields but
            ``key`` and ``labels``, the first item of a tuple or list, or the batch itself.
        key: a key per record. By default the field ``key``, or what the model is given of the record: ``record_keys``.
    """

    inputs: Callable[[Any], Any] | None = None
    key: Callable[[Any], Sequence[Any]] | None = None

    def arguments(self, batch: Any) -> Any:
        """What a model is called with for ``batch``: a mapping of keywords, a tuple of positions, or one argument."""
        if self.inputs is not None:
            return self.inputs(batch)
        if isinstance(batch, Mapping):
            return {name: value for name, value in batch.items() if name not in NON_MODEL_FIELDS}
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def keys(self, batch: Any, model: Any = None) -> list[Any]:
        """One key per record of ``batch``.

        Args:
            batch: the batch.
            model: the one that is called with it: of an encoder-decoder, the labels may be inputs.

        Raises:
            ValueError: the batch has no key and no ids, or more than ids of which nothing tells whose it is, and no
                function was given.
        """
        if self.key is not None:
            return _each(self.key(batch))
        if isinstance(batch, Mapping) and "key" in batch:
            return _each(batch["key"])
        if isinstance(batch, Mapping) and "input_ids" in batch:
            decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
            return record_keys(batch, self.arguments(batch), decodes_labels=decodes)
        raise ValueError(
            f"a batch that is a {type(batch).__name__} without input_ids or key needs key=(lambda batch: ...), which "
            "gives one key per record"
        )


def _each(keys: Any) -> list[Any]:
    """Numbers of a 1-D tensor are keys one by one, as Python's integers are; rows of a 2-D one are ids."""
    if isinstance(keys, (str, bytes)):
        raise TypeError(f"key must give one key per record, got one {type(keys).__name__}, {keys!r}")
    if isinstance(keys, Tensor) and keys.dim() == 1:
        return keys.tolist()  # type: ignore[no-any-return]
    return [key.item() if isinstance(key, Tensor) and key.dim() == 0 else key for key in keys]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A context in which ``model`` is in evaluation mode. Each submodule gets its flag back, also after an error."""
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
    """Call ``model`` with a mapping as keywords, with a tuple as positional arguments, or with one argument."""
    if isinstance(arguments, Mapping):
        return model(**arguments)
    return model(*arguments) if isinstance(arguments, tuple) else model(arguments)


def call(model: Callable[..., Any], arguments: Any) -> Any:
    """``apply(model, arguments)`` without gradients.

    It uses ``no_grad``: tensors of ``inference_mode`` could not be used under autograd by a caller's functions.
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
    """The device of a module's first weight; None for another callable, or a module without weights."""
    weights = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return weights[0].device if weights else None


def move(value: Any, device: torch.device | None) -> Any:
    """``value`` with its tensors moved to ``device``: a tensor, or a tuple or mapping of them. None: as it is."""
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
