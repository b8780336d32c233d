"""From a loader's batch to records: the teacher is run on it, and its rows are cut by record and mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.cache.format.view import View
from kdfast.models import (
    BatchFields,
    call,
    call_outputs,
    decoder_mask,
    device_of,
    is_encoder_decoder,
    logits_of,
    move,
    row_mask,
)

__all__ = ["Fields", "Part"]


@dataclass(frozen=True)
class Part:
    """One record of a batch."""

    key: Any  # as the batch has it
    logits: Tensor  # (rows, vocab)
    targets: Tensor | None  # (rows,)
    views: Sequence[View] | None


@dataclass(frozen=True, kw_only=True)
class Fields(BatchFields):
    """The functions of a batch that ``capture`` takes, None standing for its conventions; see there."""

    targets: Callable[[Any], Any] | None = None
    views: Callable[[Any], Any] | None = None

    def parts(self, model: Any, batch: Any, keys: list[Any]) -> list[Part]:
        """Run the teacher on the whole batch, whose shape affects the numbers, and cut its output into records.

        Raises:
            ValueError: rows, targets, mask or views do not fit one another.
            TypeError: no logits in what the teacher returns.
        """
        arguments = self.arguments(batch, model)
        output = call(model, arguments if self.inputs is not None else move(arguments, device_of(model)))
        logits = logits_of(output) if self.outputs is None else call_outputs(self.outputs, output, batch)
        _require(len(logits), keys, "the teacher's output")
        masks, targets, views = self._mask(model, batch, logits), *(f and f(batch) for f in (self.targets, self.views))
        for name, values in (("mask", masks), ("targets", targets), ("views", views)):
            if values is not None:
                _require(len(values), keys, name)
        return [
            _part(key, logits[i], *(None if x is None else x[i] for x in (masks, targets, views)))
            for i, key in enumerate(keys)
        ]

    def _mask(self, model: Any, batch: Any, logits: Any) -> Any:
        """Per record the rows to store: those of ``mask``, without the padding that the batch's own mask tells."""
        rows = logits.shape[:-1] if isinstance(logits, Tensor) else torch.Size([len(logits), *map(len, logits[:1])])
        if isinstance(self.mask, str):
            return row_mask(batch, rows, self.mask)
        given = None if self.mask is None else self.mask(batch)
        if not len(logits) or logits[0].dim() != 2:
            return given
        decoder = is_encoder_decoder(model)
        if given is None:
            return row_mask(batch, rows, decoder_mask if decoder else None)
        real = decoder_mask(batch) if decoder else batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if real is None or real.shape != rows:
            return given
        return [row.to(real.device) & real[i].bool() for i, row in enumerate(given)]


def _part(key: Any, logits: Tensor, mask: Tensor | None, targets: Any, views: Any) -> Part:
    rows = logits[None] if logits.dim() == 1 else logits
    if rows.dim() != 2:
        raise ValueError(
            f"a record's logits must be (rows, vocab) or (vocab,), got {tuple(logits.shape)}: classes are "
            "the last dimension, outputs=(lambda output, batch: output.movedim(1, -1).flatten(1, -2)) puts them there"
        )
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


def _require(count: int, keys: list[Any], what: str) -> None:
    if count != len(keys):
        raise ValueError(f"the batch has {len(keys)} keys, but {what} has {count} records")
