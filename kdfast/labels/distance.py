"""How far labels lie from the rows that they stand for, row by row: what a ``Floor`` is the mean of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.labels.ragged import Prototype, TopK
from kdfast.labels.soft_labels import SoftLabels
from kdfast.labels.whole import Whole

__all__ = ["Distances", "distances"]

CHUNK = 2**18  # elements in float64 at a time
SMALLEST = -1e300  # of a logarithm


class Distances(NamedTuple):
    """Of some rows, (rows,) float64 each and in nats."""

    kl: Tensor  # KL(teacher's row || label's), which is what forward KL to the label has as its least value
    entropy: Tensor  # of the teacher's row
    left_open: Tensor  # KL(teacher's row || label's) with the label's tail spread evenly, less kl: 0 but for top-k


def distances(logits: Tensor, labels: SoftLabels, temperature: float) -> Distances | None:
    """The distances of labels from the teacher's rows; None for labels of a kind whose rows are no distributions.

    Top-k labels only say how much their tail holds, and a loss takes it as one class more: their distance is that of
    these k + 1 classes, of which the teacher's own row has none. What they say nothing about is ``left_open``.

    Args:
        logits: (rows, vocab), the teacher's, any float dtype.
        labels: of these rows, on the same device; hidden ones with their output layer.
        temperature: the teacher's, at which both are compared: one that the labels hold.
    """
    if not isinstance(labels, (TopK, Prototype, Whole)):
        return None
    rows = max(1, CHUNK // logits.shape[1])
    parts = [
        _distances(logits[first : first + rows], labels[first : first + rows], temperature)
        for first in range(0, max(1, len(logits)), rows)
    ]
    return Distances(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _distances(logits: Tensor, labels: SoftLabels, temperature: float) -> Distances:
    log_p = (logits.detach().double() / temperature).log_softmax(1)
    # What is masked adds nothing: 0 times a number, which infinity is not.
    p, log_p = log_p.exp(), log_p.clamp_(min=SMALLEST)
    entropy = (-_dot(p, log_p)).clamp(min=0)
    if isinstance(labels, Whole):
        log_q = (labels.to_dense().values.double() / temperature).log_softmax(1)
        kl = -entropy - _dot(p, torch.where(p > 0, log_q, 0.0))
        return Distances(kl.clamp(min=0), entropy, torch.zeros_like(kl))
    assert isinstance(labels, (TopK, Prototype))
    return _of_entries(p, log_p, entropy, labels.without_padding(), temperature)


def _of_entries(p: Tensor, log_p: Tensor, entropy: Tensor, labels: TopK | Prototype, temperature: float) -> Distances:
    """The distances of rows with some entries and a tail. ``p`` loses the entries."""
    weights, log_tail = labels.at(temperature)
    assert log_tail is not None
    entries = (labels.entry_rows, labels.ids.long())
    inside, zero = p[entries], p.new_zeros(())
    head = torch.zeros_like(entropy).index_add(0, entries[0], inside * (log_p[entries] - weights.double().log()))
    rest = p.index_put_(entries, zero)
    mass, log_tail = rest.sum(1), log_tail.double()
    shape = _dot(rest, log_p) - torch.xlogy(mass, mass)  # of the tail: minus its entropy, times its mass
    head = head + torch.where(mass > 0, mass * (mass.log() - log_tail), 0.0)
    if isinstance(labels, TopK):
        columns = (p.shape[1] - labels.counts).clamp(min=1)
        return Distances(head.clamp(min=0), entropy, (shape + mass * columns.log()).clamp(min=0))
    tails = labels.prototypes[labels.prototype_ids].float().index_put_(entries, zero.float())
    outside = tails.double().sum(1)
    log_tails = torch.where(rest > 0, tails.log().double(), 0.0)
    # Where the prototype has nothing outside the entries, these take all.
    lost = torch.where(outside > 0, 0.0, torch.log1p(-log_tail.exp()))
    outside = torch.where(outside > 0, outside, 1.0)
    kl = head + (1 - mass) * lost + shape - _dot(rest, log_tails) + mass * outside.log()
    return Distances(kl.clamp(min=0), entropy, torch.zeros_like(kl))


def _dot(p: Tensor, logs: Tensor) -> Tensor:
    """(rows,) the sum of ``p * logs`` over the columns."""
    return torch.linalg.vecdot(p, logs)
