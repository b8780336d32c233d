"""What a batch holds: the models' arguments, the labels, the records' keys, and labels that a cache put there."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.cache import PackedLabels
from kdfast.labels import SoftLabels
from kdfast.models import NON_MODEL_FIELDS, BatchFields

__all__ = ["Fields", "samples", "split", "tensors", "to_device"]


@dataclass(frozen=True)
class Fields:
    """The functions of a batch that ``Distiller`` takes, or what stands for them.

    Without functions a batch is a pair (inputs, labels), inputs alone, or a mapping: its ``labels`` and ``key`` are
    themselves, all the rest the model's keywords. Of a pair (batch, cached labels) they see the batch.
    """

    inputs: Callable[[Any], Any] | None = None
    labels: Callable[[Any], Tensor | None] | None = None
    key: Callable[[Any], Sequence[Any]] | None = None

    def arguments(self, batch: Any) -> Any:
        """What the models are called with: a mapping's keywords, a tuple's positions, or one argument."""
        if self.inputs is not None:
            return self.inputs(batch)
        if isinstance(batch, Mapping):
            return {name: value for name, value in batch.items() if name not in NON_MODEL_FIELDS}
        return batch[0] if isinstance(batch, tuple) else batch

    def labels_of(self, batch: Any) -> Tensor | None:
        """Class indices or probabilities; None where the batch has none.

        Raises:
            TypeError: they are not a tensor.
        """
        if self.labels is not None:
            labels = self.labels(batch)
        elif isinstance(batch, Mapping):
            labels = batch.get("labels")
        else:
            labels = batch[1] if isinstance(batch, tuple) and len(batch) > 1 else None
        if labels is not None and not isinstance(labels, Tensor):
            raise TypeError(
                f"a batch's labels must be a tensor, got {type(labels).__name__}: say by labels=(lambda batch: ...) "
                "where they are"
            )
        return labels

    def keys_of(self, batch: Any) -> list[Any]:
        """One per record. Raises ``ValueError`` where a batch has neither key nor ids, and no function was given."""
        return BatchFields(key=self.key).keys(batch)


def split(batch: Any) -> tuple[Any, SoftLabels | PackedLabels | None]:
    """A batch and the labels that ``CacheDataset`` gave it, if it comes from there."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], (SoftLabels, PackedLabels)):
        return batch[0], batch[1]
    return batch, None


def to_device(value: Any, device: torch.device | None) -> Any:
    """``value`` with its tensors and labels on ``device``, and its lists, which loaders make of tuples, as tuples.

    Named tuples and dicts of a class of their own, such as a model's output, stay what they are.
    """
    if isinstance(value, (Tensor, SoftLabels, PackedLabels)):
        return value if device is None else value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return _filled(value, {name: to_device(item, device) for name, item in value.items()})
    if not isinstance(value, (tuple, list)):
        return value
    items = [to_device(item, device) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _filled(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """``items`` in a mapping of the same type, where a copy of it has contents of its own; else as they are."""
    if type(mapping) is dict or not isinstance(mapping, (dict, UserDict)):
        return items
    filled = copy(mapping)
    for name, item in items.items():
        filled[name] = item
    return filled


def samples(arguments: Any) -> int:
    """How many samples a model is called with: the length of the first tensor that has one; else 1."""
    return next((len(x) for x in tensors(arguments) if x.dim()), 1)


def tensors(value: Any) -> Iterator[Tensor]:
    """Those in a tensor, mapping, tuple or list, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)
