"""What a batch holds: the models' arguments, the labels, the records' keys, and labels that a cache put there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.cache import PackedLabels
from kdfast.cache.batches import NOT_THE_MODEL_S
from kdfast.cache.batches import Fields as CacheFields
from kdfast.labels import SoftLabels

__all__ = ["Fields", "apply", "samples", "split", "to_device"]


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
            return {name: value for name, value in batch.items() if name not in NOT_THE_MODEL_S}
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
        return CacheFields(key=self.key).keys(batch)


def split(batch: Any) -> tuple[Any, SoftLabels | PackedLabels | None]:
    """A batch and the labels that ``CacheDataset`` gave it, if it comes from there."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], (SoftLabels, PackedLabels)):
        return batch[0], batch[1]
    return batch, None


def to_device(value: Any, device: torch.device | None) -> Any:
    """``value`` with its tensors and labels on ``device``, and its lists, which loaders make of tuples, as tuples."""
    if isinstance(value, (Tensor, SoftLabels, PackedLabels)):
        return value if device is None else value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    return tuple(to_device(item, device) for item in value) if isinstance(value, (tuple, list)) else value


def samples(arguments: Any) -> int:
    """How many samples a model is called with: the length of the first tensor; 1 without any."""
    if isinstance(arguments, Tensor):
        return len(arguments) if arguments.dim() else 1
    if isinstance(arguments, (Mapping, tuple)):
        for value in arguments.values() if isinstance(arguments, Mapping) else arguments:
            return samples(value)
    return 1


def apply(model: Any, arguments: Any) -> Any:
    """``model`` of a mapping's keywords, a tuple's positions, or one argument."""
    if isinstance(arguments, Mapping):
        return model(**arguments)
    return model(*arguments) if isinstance(arguments, tuple) else model(arguments)
