"""What labels of any codec obey, however they came to be: checked of whatever a reader accepts."""

from __future__ import annotations

import torch

from kdfast.labels import Dense, Hidden, Prototype, SoftLabels, TopK, Weights
from kdfast.labels.ragged import Ragged

__all__ = ["same", "violation"]

FIELDS = ("values", "ids", "offsets", "tails", "prototype_ids")


def violation(labels: SoftLabels, sums_to_one: bool) -> str:
    """What is wrong with ``labels``, or nothing. ``sums_to_one``: the weights of a row add up to 1."""
    if labels.values.isnan().any() or labels.values.isposinf().any():
        return "a value is NaN or infinite"
    if isinstance(labels, Hidden):
        return "" if labels.values.isfinite().all() else "a hidden state is not finite"
    if isinstance(labels, Dense):
        off = (labels.values.double().logsumexp(1)).abs().max() if len(labels) else 0
        return "" if off < 1e-4 else f"a row's probabilities are off by {off} nats"
    assert isinstance(labels, Ragged)
    return _entries(labels) or _masses(labels, sums_to_one)


def _entries(labels: Ragged) -> str:
    counts, row = labels.counts, labels.entry_rows
    if (counts < 0).any() or int(labels.offsets[-1]) != len(labels.ids) or len(labels.ids) != len(labels.values):
        return "counts do not go with the entries"
    if len(labels.ids) and not 0 <= int(labels.ids.min()) <= int(labels.ids.max()) < labels.vocab_size:
        return "an id is outside the vocabulary"
    if len((row * labels.vocab_size + labels.ids.long()).unique()) < len(labels.ids):
        return "a row names an id twice"
    return ""


def _masses(labels: Ragged, sums_to_one: bool) -> str:
    row, rows = labels.entry_rows, len(labels)
    if isinstance(labels, TopK):
        if (labels.values > 0).any() or not (labels.tails <= 0).all():
            return "a log-probability is above 0"
        ascends = (labels.values[1:] > labels.values[:-1]) & (row[1:] == row[:-1])
        return "entries are not largest first" if ascends.any() else ""
    sums = torch.zeros(rows, dtype=torch.float64).index_add(0, row, labels.values.double())
    if isinstance(labels, Prototype):
        sums += labels.tails[0].double().exp()
        if len(sums) and not 0 <= int(labels.prototype_ids.min()) <= int(labels.prototype_ids.max()) < len(
            labels.prototypes
        ):
            return "a prototype is not in the table"
        sums_to_one = True
    if isinstance(labels, (Prototype, Weights)) and (labels.values < 0).any():
        return "a weight is negative"
    if sums_to_one and rows and (sums - 1).abs().max() > 1e-4:
        return f"a row adds up to {sums[(sums - 1).abs().argmax()]}"
    return ""


def same(a: SoftLabels, b: SoftLabels) -> bool:
    """Whether two labels are one, to the bit."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in FIELDS]
    return type(a) is type(b) and all(x is y is None or (x.shape == y.shape and torch.equal(x, y)) for x, y in pairs)
