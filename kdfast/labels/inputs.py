"""What the constructors of ``SoftLabels`` are given: checked, and laid out in one way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast._checks import can_look, check_integer, check_number
from kdfast.labels.entries import rows_of_entries
from kdfast.labels.repeats import check_ids, check_offsets, check_prototype_ids
from kdfast.masks import as_mask

__all__ = [
    "check_entries",
    "check_not_negative",
    "check_present",
    "check_prototypes",
    "check_size",
    "check_temperatures",
    "check_tensors",
    "flat_entries",
]


def check_tensors(**tensors: object) -> None:
    """Raise ``TypeError`` for what is neither a strided tensor nor None, under its name."""
    for name, x in tensors.items():
        if x is not None and (not isinstance(x, Tensor) or x.layout != torch.strided):
            got = f"a {x.layout} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor, got {got}")


def check_size(vocab_size: object) -> int:
    """``vocab_size`` as an int. Raise ``TypeError`` or ``ValueError`` unless it is a positive integer."""
    return check_integer("vocab_size", vocab_size, least=1)


def flat_entries(ids: Tensor, values: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Int32 ids, float32 values and offsets, from (rows, K) entries, or from flat ones with their ``offsets``.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit, naming them.
    """
    check_tensors(ids=ids, values=values, offsets=offsets)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if not values.is_floating_point():
        raise TypeError(f"values must be floating point, got {values.dtype}")
    if ids.shape != values.shape:
        raise ValueError(f"ids and values must have one shape, got {tuple(ids.shape)} and {tuple(values.shape)}")
    if offsets is None:
        if ids.dim() != 2:
            raise ValueError(f"ids must be (rows, K) unless offsets are given, got {tuple(ids.shape)}")
        rows, k = ids.shape
        offsets = torch.arange(rows + 1, device=ids.device) * k
    elif offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() < 1 or ids.dim() != 1:
        raise ValueError(
            f"ragged labels need flat ids and int64 offsets of (rows + 1,), got ids {tuple(ids.shape)} "
            f"and offsets {offsets.dtype} {tuple(offsets.shape)}"
        )
    if ids.dtype == torch.int64:
        # What 32 bits do not hold is out of range, and must not come round to an id that is in it.
        ids = torch.where(ids == ids.to(torch.int32), ids, -1)
    return ids.reshape(-1).to(torch.int32).contiguous(), values.reshape(-1).float().contiguous(), offsets.contiguous()


def check_entries(
    ids: Tensor, offsets: Tensor, padding: Tensor, present: Tensor | None, size: int, *, once: str | None
) -> None:
    """Raise ``ValueError`` for offsets, ids or repeats that a loss cannot take, where looking at them is cheap.

    Args:
        ids, padding: (nnz,), padding bool: entries that do not count, whatever their ids.
        present: (rows,) bool: rows whose entries count; None: all.
        once: how to mend a row that names an id twice; None: it may.
    """
    if offsets.device != ids.device:
        raise ValueError(f"ids are on {ids.device}, offsets on {offsets.device}")
    if not (can_look(ids) and can_look(padding)):
        return
    check_offsets(offsets, len(ids))
    if present is not None and len(ids):
        padding = padding | ~present.to(ids.device)[rows_of_entries(offsets, len(ids))]
    check_ids(ids, offsets, padding, size, once=once)


def check_not_negative(name: str, values: Tensor) -> None:
    """Raise ``ValueError`` for a negative weight or probability, where looking at them is cheap."""
    if can_look(values) and values.numel() and float(values.min()) < 0.0:
        raise ValueError(
            f"{name} must not be negative, got {float(values.min())}; of log-probabilities take the exponential"
        )


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless they are positive and finite numbers, and there is one."""
    if not isinstance(temperatures, Sequence) or isinstance(temperatures, str):
        raise TypeError(f"temperatures must be a sequence of numbers, got {type(temperatures).__name__}")
    for one in temperatures:
        check_number("temperature", one.item() if isinstance(one, Tensor) and one.numel() == 1 else one)
    if not temperatures or not all(0.0 < t < float("inf") for t in temperatures):
        raise ValueError(f"temperatures must be positive and finite, got {tuple(temperatures)}")


def check_present(present: Tensor | None, rows: int) -> Tensor | None:
    """``present`` as bool. Raise ``TypeError`` or ``ValueError`` unless it is None or a mask of ``rows``."""
    return None if present is None else as_mask("present", present, (rows,))


def check_prototypes(tails: Tensor, prototype_ids: Tensor, prototypes: Tensor, rows: int, vocab_size: int) -> None:
    """Raise ``TypeError`` or ``ValueError``, naming it, for what is no tail or prototype of ``rows`` rows."""
    check_tensors(tails=tails, prototype_ids=prototype_ids, prototypes=prototypes)
    if tails.shape != (rows,):
        raise ValueError(f"tails must be ({rows},) log-masses, got {tuple(tails.shape)}")
    if prototype_ids.is_floating_point() or prototype_ids.dtype == torch.bool:
        raise TypeError(f"prototype_ids must be integers, got {prototype_ids.dtype}")
    if prototype_ids.shape != (rows,):
        raise ValueError(f"prototype_ids must be ({rows},), a row of prototypes each, got {tuple(prototype_ids.shape)}")
    if prototypes.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"prototypes must be float32 or bfloat16 probabilities, got {prototypes.dtype}")
    if prototypes.dim() != 2 or prototypes.shape[1] != vocab_size or not prototypes.is_contiguous():
        raise ValueError(
            f"prototypes must be a contiguous (S, {vocab_size}) table, got {tuple(prototypes.shape)} with strides "
            f"{prototypes.stride()}"
        )
    if can_look(prototype_ids):
        check_prototype_ids(prototype_ids, len(prototypes))
