"""What a batch says: the teacher's arguments, the records' keys, and what goes with their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.cache.format.view import View
from kdfast.models import call, device_of, logits_of, move

__all__ = ["Fields", "Part"]

NOT_THE_MODEL_S = ("key", "labels")  # of a mapping


@dataclass(frozen=True)
class Part:
    """One record of a batch."""

    key: Any  # as the batch has it
    logits: Tensor  # (rows, vocab)
    targets: Tensor | None  # (rows,)
    views: Sequence[View] | None


@dataclass(frozen=True)
class Fields:
    """The functions of a batch that ``capture`` takes, or what stands for them."""

    inputs: Callable[[Any], Any] | None = None
    outputs: Callable[[Any, Any], Any] | None = None
    key: Callable[[Any], Sequence[Any]] | None = None
    targets: Callable[[Any], Any] | None = None
    mask: Callable[[Any], Any] | None = None
    views: Callable[[Any], Any] | None = None

    def keys(self, batch: Any) -> list[Any]:
        """One per record.

        Raises:
            ValueError: the batch has no key and no ids, and no function was given.
        """
        if self.key is not None:
            return _each(self.key(batch))
        if isinstance(batch, Mapping) and "key" in batch:
            return _each(batch["key"])
        if isinstance(batch, Mapping) and "input_ids" in batch:
            real = batch.get("attention_mask")
            return [ids if real is None else ids[real[i].bool()] for i, ids in enumerate(batch["input_ids"])]
        raise ValueError(
            f"a batch that is a {type(batch).__name__} without input_ids or key needs key=(lambda batch: ...), which "
            "gives one key per record"
        )

    def parts(self, model: Any, batch: Any, keys: list[Any]) -> list[Part]:
        """Run the teacher on the whole batch: its shape is part of the numbers.

        Raises:
            ValueError: rows, targets, mask or views do not fit one another.
            TypeError: no logits in what the teacher returns.
        """
        output = call(model, self._arguments(model, batch))
        logits = logits_of(output) if self.outputs is None else self.outputs(output, batch)
        _require(len(logits), keys, "the teacher's output")
        masks, targets, views = self._mask(batch, logits), *(f and f(batch) for f in (self.targets, self.views))
        for name, values in (("mask", masks), ("targets", targets), ("views", views)):
            if values is not None:
                _require(len(values), keys, name)
        return [
            _part(key, logits[i], *(None if x is None else x[i] for x in (masks, targets, views)))
            for i, key in enumerate(keys)
        ]

    def _arguments(self, model: Any, batch: Any) -> Any:
        if self.inputs is not None:
            return self.inputs(batch)
        if isinstance(batch, Mapping):
            batch = {name: value for name, value in batch.items() if name not in NOT_THE_MODEL_S}
        elif isinstance(batch, (tuple, list)):
            batch = batch[0]  # the others are labels
        return move(batch, device_of(model))

    def _mask(self, batch: Any, logits: Any) -> Any:
        """Padding is never stored: by ``attention_mask`` where the batch has one and records have a row per id."""
        given = None if self.mask is None else self.mask(batch)
        real = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if real is None or not len(logits) or logits[0].dim() == 1:
            return given
        real = real.bool()
        return real if given is None else [row.to(real.device) & real[i] for i, row in enumerate(given)]


def _part(key: Any, logits: Tensor, mask: Tensor | None, targets: Any, views: Any) -> Part:
    rows = logits[None] if logits.dim() == 1 else logits
    if rows.dim() != 2:
        raise ValueError(f"a record's logits must be (rows, vocab) or (vocab,), got {tuple(logits.shape)}")
    if targets is not None:
        targets = torch.as_tensor(targets).reshape(-1)
    if views is not None and not isinstance(views, Sequence):
        views = [views]
    for name, values in (("mask", mask), ("targets", targets), ("views", views)):
        if values is not None and len(values) != len(rows):
            raise ValueError(f"{name} of a record must have one value per row: {len(rows)}, got {len(values)}")
    if mask is None:
        return Part(key, rows, targets, views)
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise ValueError(f"mask of a record must be a bool per row, got {mask.dtype} {tuple(mask.shape)}")
    kept = mask.cpu()
    targets = None if targets is None else targets[kept.to(targets.device)]
    views = None if views is None else [view for view, keep in zip(views, kept.tolist(), strict=True) if keep]
    return Part(key, rows[kept.to(rows.device)], targets, views)


def _each(keys: Any) -> list[Any]:
    """Numbers of a 1-D tensor are keys one by one, as Python's integers are; rows of a 2-D one are ids."""
    return keys.tolist() if isinstance(keys, Tensor) and keys.dim() == 1 else list(keys)


def _require(count: int, keys: list[Any], what: str) -> None:
    if count != len(keys):
        raise ValueError(f"the batch has {len(keys)} keys, but {what} has {count} records")
