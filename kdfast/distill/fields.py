"""The parts of a batch: the models' arguments, the labels, the records' keys, and labels that come from a cache."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.cache import PackedLabels
from kdfast.labels import SoftLabels
from kdfast.models import BatchFields

__all__ = ["Fields", "samples", "split", "tensors", "to_device"]


@dataclass(frozen=True, kw_only=True)
class Fields(BatchFields):
    """Finds the parts of a batch: by the functions that ``Distiller`` takes, else by the batch's layout.

    Without functions a batch is a pair (inputs, labels), inputs alone, or a mapping. A mapping holds ``labels`` and
    ``key``, and everything else in it is passed to the models by keyword. Of a pair (batch, cached labels), which
    ``split`` takes apart, only the batch is looked at.
    """

    labels: Callable[[Any], Tensor | None] | None = None
    cache_mask: Callable[[Any], Any] | None = None

    def labels_of(self, batch: Any) -> Tensor | None:
        """The batch's labels, class indices or probabilities; None if it has none.

        Raises:
            TypeError: the labels are not a tensor.
        """
        if self.labels is not None:
            labels = self.labels(batch)
        elif isinstance(batch, Mapping):
            labels = batch.get("labels")
        else:
            labels = batch[1] if isinstance(batch, tuple) and len(batch) > 1 else None
        if labels is not None and not isinstance(labels, Tensor):
            where = (
                "torch.from_numpy makes one" if isinstance(labels, np.ndarray) else "say by labels=(lambda batch: ...)"
            )
            rest = "" if isinstance(labels, np.ndarray) else " where they are"
            raise TypeError(f"a batch's labels must be a tensor, got {type(labels).__name__}: {where}{rest}")
        return labels


def split(batch: Any) -> tuple[Any, SoftLabels | PackedLabels | None]:
    """Split what ``CacheDataset`` collates into the batch and its cached labels. Any other batch comes with None."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], (SoftLabels, PackedLabels)):
        return batch[0], batch[1]
    return batch, None


def to_device(value: Any, device: torch.device | None) -> Any:
    """Move the tensors and soft labels inside ``value`` to ``device``; None leaves them where they are.

    Lists become tuples, because a ``DataLoader`` turns a dataset's tuples into lists. Named tuples and mappings of
    other classes, such as a model's output, keep their class.
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
    """``items`` in a copy of ``mapping``, to keep its class; as a dict if a copy would share its contents."""
    if type(mapping) is dict or not isinstance(mapping, (dict, UserDict)):
        return items
    filled = copy(mapping)
    for name, item in items.items():
        filled[name] = item
    return filled


def samples(arguments: Any) -> int:
    """The number of samples in a model's arguments: the length of the first tensor that is no scalar; 1 without one."""
    return next((len(x) for x in tensors(arguments) if x.dim()), 1)


def tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in a tensor, mapping, tuple or list, nested to any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)
