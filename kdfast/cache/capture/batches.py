"""From a loader's batch to records: the teacher is run on it, and its rows are cut by record and mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.cache.format.view import View
from kdfast.masks import as_mask
from kdfast.models import (
    BatchFields,
    call,
    call_outputs,
    check_no_sigmoid,
    decoder_mask,
    device_of,
    is_encoder_decoder,
    labelled,
    logits_of,
    move,
    row_mask,
)

__all__ = ["Fields", "Mark", "Part", "bad_row"]


@dataclass(frozen=True)
class Part:
    """One record of a batch."""

    key: Any  # as the batch has it
    logits: Tensor  # (rows, vocab)
    targets: Tensor | None  # (rows,)
    views: Sequence[View] | None


class Mark(NamedTuple):
    """What tells whether a record is the one that is stored under its key."""

    targets: Tensor | None  # of the rows that are stored
    rows: int | None

    @classmethod
    def of(cls, targets: Tensor | None, kept: Tensor | None, length: int | None) -> Mark:
        """The mark of a record of ``length`` rows, of which those of ``kept`` are stored, None standing for all."""
        if kept is None:
            return cls(targets, length)
        return cls(None if targets is None else targets[kept], int(kept.sum()))


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
        if self.outputs is None:
            check_no_sigmoid("teacher", model, logits)
        masks, targets, views = self._mask(model, batch, logits), *(f and f(batch) for f in (self.targets, self.views))
        for name, values in (("mask", masks), ("targets", targets), ("views", views)):
            if values is not None:
                _require(len(values), keys, name)
        return [
            _part(key, logits[i], *(None if x is None else x[i] for x in (masks, targets, views)))
            for i, key in enumerate(keys)
        ]

    def marks(self, batch: Any, keys: list[Any]) -> list[list[Mark]]:
        """Per record what is known without the teacher of its targets and rows: several marks where it may be either.

        Only the teacher's output tells whether an ``attention_mask`` is over the rows, or over what an encoder reads,
        while the rows are a decoder's.
        """
        masks = batch[self.mask] if isinstance(self.mask, str) else self.mask and self.mask(batch)
        targets = None if self.targets is None else self.targets(batch)
        real = _row_masks(batch)
        plain = all(f is None for f in (self.mask, self.targets, self.inputs, self.outputs, self.key))
        found = []
        for i, name in enumerate(keys):
            if plain and isinstance(name, Tensor):  # text: a row for each token, or one for all
                found.append([Mark(None, 1), Mark(None, len(name))])
                continue
            ids = None if targets is None else torch.as_tensor(targets[i]).reshape(-1).cpu()
            kept = None if masks is None else torch.as_tensor(masks[i]).cpu() != 0
            length = next((len(x) for x in (kept, ids) if x is not None), None)
            either = [Mark.of(ids, kept, length)]
            for own in (mask[i].cpu() for mask in real):
                if length is not None and tuple(own.shape) == (length,):
                    either.append(Mark.of(ids, own if kept is None else own & kept, length))
            found.append(either)
        return found

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
        return [_real_rows(torch.as_tensor(row).to(real.device), real[i].bool()) for i, row in enumerate(given)]


def _real_rows(given: Tensor, real: Tensor) -> Tensor:
    """A record's mask without its padding. A product: what is no mask of these rows stays none, and is refused."""
    return given * real if given.shape == real.shape else given


def _part(key: Any, logits: Tensor, mask: Tensor | None, targets: Any, views: Any) -> Part:
    rows = logits[None] if logits.dim() == 1 else logits
    if rows.dim() != 2:
        several = ", and several layers of a row's hidden states are a cache each" if rows.dim() == 3 else ""
        raise ValueError(
            f"a record's logits must be (rows, vocab) or (vocab,), got {tuple(logits.shape)}: classes are "
            "the last dimension, outputs=(lambda output, batch: output.movedim(1, -1).flatten(1, -2)) puts them "
            f"there{several}"
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
    kept = as_mask("mask of a record", torch.as_tensor(mask), (len(rows),)).cpu()
    targets = None if targets is None else targets[kept.to(targets.device)]
    views = None if views is None else [view for view, keep in zip(views, kept.tolist(), strict=True) if keep]
    return Part(key, rows[kept.to(rows.device)], targets, views)


def _row_masks(batch: Any) -> list[Tensor]:
    """The masks of a batch that may be over the teacher's rows, as bool."""
    if not isinstance(batch, Mapping):
        return []
    found = [batch[name].bool() for name in ("attention_mask", "decoder_attention_mask") if batch.get(name) is not None]
    real = labelled(batch.get("labels"))
    return found if real is None or real.dim() < 2 else [*found, real]


def bad_row(logits: Tensor) -> str:
    """Say which row of ``logits`` cannot be stored, and why: the first that has NaN, +inf, or no finite column.

    Args:
        logits: (rows, vocab).

    Returns:
        A text such as "row 3 has a value of nan"; "" if all rows can be stored.
    """
    # The maximum is NaN or +inf if any column is, and -inf if no column is finite.
    largest = logits.detach().amax(1) if logits.numel() else logits.new_zeros(0)
    for row in (~largest.isfinite()).nonzero().flatten().tolist()[:1]:
        value = float(largest[row])
        return f"row {row} has {'no finite value' if value == -torch.inf else f'a value of {value}'}"
    return ""


def _require(count: int, keys: list[Any], what: str) -> None:
    if count != len(keys):
        raise ValueError(f"the batch has {len(keys)} keys, but {what} has {count} records")
