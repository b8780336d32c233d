"""Measuring how far labels are from the teacher's distribution: gradient noise, bias, KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.labels import Prototype, Ragged, SoftLabels

__all__ = ["Quality", "Source", "distributions", "quality"]

CHUNK = 64  # rows whose whole distributions are in memory
# Rounding (8 bits of a prototype, a tail that float16 entries leave no room for) is below this, cuts are above.
MISSED = 1e-4

# (rows, draw) -> (rows, vocab) float64: what training sees of these rows. Draw 0 is what the cache holds, the others
# are what it would hold with another seed.
Source = Callable[[slice, int], Tensor]


@dataclass(frozen=True)
class Quality:
    """How far labels are from the teacher: means over rows, in squared probabilities and in nats."""

    noise: float  # E |label - p|^2: of the gradient in the logits, in one step
    bias: float  # |E label - p|^2: what of it stays, however many draws are averaged; without draws all of it
    bias_error: float  # one standard error of ``bias``, 0 without draws
    missed: float  # the teacher's probability of columns to which the label gives none
    kl: float | None  # KL(p || label) over all other columns; None, for infinite, if more than ``MISSED`` is missed


def quality(logits: Tensor, source: Source, draws: int) -> Quality:
    """Compare ``source`` with the softmax of ``logits``, (rows, vocab).

    Args:
        draws: how many draws to tell noise from bias by; 1 for labels that are not drawn.
    """
    noise, bias, missed, kl = [], [], [], []
    for start in range(0, len(logits), CHUNK):
        rows = slice(start, min(start + CHUNK, len(logits)))
        p = logits[rows].double().softmax(1)
        first = source(rows, 0)
        there = first > 0
        missed.append(p.masked_fill(there, 0.0).sum(1))
        kl.append(torch.where(there, torch.xlogy(p, p) - torch.xlogy(p, first), 0.0).sum(1))
        errors = first - p
        noise.append(errors.square().sum(1))
        bias.append(_bias(p, source, rows, errors, draws) if draws > 1 else noise[-1])
    b, left_out = torch.cat(bias), float(torch.cat(missed).mean())
    return Quality(
        noise=float(torch.cat(noise).mean()),
        bias=float(b.mean()),
        bias_error=float(b.std()) / len(b) ** 0.5 if draws > 1 else 0.0,
        missed=left_out,
        kl=float(torch.cat(kl).mean()) if left_out < MISSED else None,
    )


def _bias(p: Tensor, source: Source, rows: slice, errors: Tensor, draws: int) -> Tensor:
    """The mean product of the errors of two different draws: its expectation is the bias squared, without noise."""
    total, squares = errors.clone(), errors.square().sum(1)
    for draw in range(1, draws):
        errors = source(rows, draw) - p
        total += errors
        squares += errors.square().sum(1)
    return (total.square().sum(1) - squares) / (draws * (draws - 1))


def distributions(labels: SoftLabels) -> Tensor:
    """(rows, vocab) float64, from labels of any sparse kind. A top-k label's tail is spread over the other columns."""
    assert isinstance(labels, Ragged)
    values, tail = labels.at(labels.temperatures[0])
    row, ids = labels.entry_rows, labels.ids.long()
    if isinstance(labels, Prototype):
        p = labels.prototypes[labels.prototype_ids].double().index_put((row, ids), torch.zeros((), dtype=torch.float64))
        p /= p.sum(1, keepdim=True)
    else:
        p = torch.ones(len(labels), labels.vocab_size, dtype=torch.float64)
        p /= (labels.vocab_size - labels.counts).clamp(min=1)[:, None]
    p *= 0.0 if tail is None else tail.double().exp()[:, None]
    return p.index_put((row, ids), values.double())
