"""The alignment canary: which targets a record was taken for, and how well the teacher predicts them.

A student trained on shifted, re-tokenised or simply other text than the teacher saw would learn nonsense in silence.
The checksum of the targets tells records apart; the teacher's cross-entropy tells whether they were its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast._C import crc32c
from kdfast.cache.codecs.base import float64_chunks
from kdfast.cache.selection.select import top

__all__ = ["Targets", "cross_entropy", "targets_crc", "targets_of"]

IGNORED = 0xFFFFFFFF  # stands for every negative id


class Targets(NamedTuple):
    """What a shard keeps of a record's targets."""

    crc: int
    cross_entropy: float  # in nats, summed over ``positions``
    positions: int  # rows that have a target


def targets_of(targets: Tensor, rows: int, vocab_size: int) -> Tensor:
    """``targets`` as (rows,) int64 on the CPU, checked.

    Raises:
        TypeError: they are not an integer tensor.
        ValueError: not one per row, or an id outside the vocabulary.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be an integer tensor, got {got}")
    flat = targets.detach().reshape(-1).long().cpu()
    if targets.dim() > 1 or flat.numel() != rows:
        raise ValueError(f"targets must be ({rows},), one per row, got {tuple(targets.shape)}")
    if rows and int(flat.max()) >= vocab_size:
        raise ValueError(f"targets must lie below vocab_size {vocab_size}, got {int(flat.max())}")
    return flat


def targets_crc(targets: Tensor) -> int:
    """CRC-32C of the ids as u32, little-endian; ignored ones, which are negative, as 0xFFFFFFFF."""
    ids = targets.numpy()
    return int(crc32c(np.where(ids < 0, IGNORED, ids).astype("<u4")))


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    """The teacher's cross-entropy on the targets: the sum in nats over the rows that have one, and their number.

    Targets whose logit is -inf are left out: their cross-entropy is not finite.

    Args:
        logits: (rows, vocab), any float dtype and device.
        targets: (rows,), as ``targets_of`` gives them.
    """
    kept = (targets >= 0).nonzero().flatten()
    if not len(kept):
        return 0.0, 0
    rows = kept.to(logits.device)
    at = logits[rows, targets[kept].to(logits.device)].double()
    loss = (_logsumexp(logits)[rows].double() - at).cpu()
    loss = loss[loss.isfinite()]
    return float(loss.sum()), len(loss)


def _logsumexp(logits: Tensor) -> Tensor:
    """(rows,) float log-sum-exp, on a CPU in a fraction of the time that PyTorch takes."""
    if logits.device.type == "cpu":
        return top(logits, temperature=1.0, k=0).lse
    return torch.cat([chunk.logsumexp(1) for chunk in float64_chunks(logits)])
