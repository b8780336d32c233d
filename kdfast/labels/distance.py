"""How far labels lie from the rows that they stand for, row by row: what a ``Floor`` is the mean of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.labels.ragged import Prototype, TopK
from kdfast.labels.soft_labels import SoftLabels
from kdfast.labels.whole import Whole

__all__ = ["Distances", "distances"]

CHUNK = 2**20  # elements in float64 at a time


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
    labels = labels.without_padding()
    log_p = (logits.detach().double() / temperature).log_softmax(1)
    p = log_p.exp()
    entropy = -_sum(p, log_p)
    if isinstance(labels, TopK):
        return _of_top(p, log_p, entropy, labels, temperature)
    log_q = _whole(labels, temperature)
    kl = _sum(p, log_p - log_q).clamp(min=0)
    return Distances(kl, entropy, torch.zeros_like(kl))


def _of_top(p: Tensor, log_p: Tensor, entropy: Tensor, labels: TopK, temperature: float) -> Distances:
    weights, tail = labels.at(temperature)
    assert tail is not None
    row, column = labels.entry_rows, labels.ids.long()
    inside = torch.zeros_like(p, dtype=torch.bool).index_put((row, column), torch.tensor(True, device=p.device))
    rest = p.masked_fill(inside, 0.0)
    mass, log_tail = rest.sum(1), tail.double()
    log_weights = torch.full_like(p, -torch.inf).index_put((row, column), weights.double().log())
    head = _sum(p.masked_fill(~inside, 0.0), log_p - log_weights)
    kl = (head + _sum(mass[:, None], (mass.log() - log_tail)[:, None])).clamp(min=0)
    # Within the tail: KL of its own shape from an even one.
    columns = (~inside).sum(1).clamp(min=1)
    open_ = _sum(rest, log_p - mass.log()[:, None] + columns.log()[:, None])
    return Distances(kl, entropy, open_.clamp(min=0))


def _whole(labels: SoftLabels, temperature: float) -> Tensor:
    """(rows, vocab) float64: the log-probabilities that the labels say."""
    if not isinstance(labels, Prototype):
        return (labels.to_dense().values.double() / temperature).log_softmax(1)
    weights, log_tail = labels.at(temperature)
    assert log_tail is not None
    row, column = labels.entry_rows, labels.ids.long()
    shape = labels.prototypes[labels.prototype_ids].double()
    inside = torch.zeros_like(shape, dtype=torch.bool).index_put((row, column), torch.tensor(True, device=shape.device))
    shape = shape.masked_fill(inside, 0.0)
    outside = shape.sum(1, keepdim=True)
    q = shape * (log_tail.double().exp()[:, None] / torch.where(outside > 0, outside, 1.0))
    q = q.index_put((row, column), weights.double(), accumulate=True)
    return (q / q.sum(1, keepdim=True)).log()


def _sum(p: Tensor, logs: Tensor) -> Tensor:
    """(rows,) the sum of ``p * logs`` over the columns where ``p`` is not 0."""
    return torch.where(p > 0, p * logs, 0.0).sum(1)
