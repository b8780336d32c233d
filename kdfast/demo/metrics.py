"""The metrics of a model: accuracy, and the macro averages of precision, recall, F1 and AUC."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.functional import classification as metrics

from kdfast.demo.data import CLASSES, Split
from kdfast.demo.models import logits_of

__all__ = ["METRICS", "Scores", "score"]

Scores = dict[str, float]
METRICS: dict[str, Callable[..., Tensor]] = {
    "accuracy": metrics.multiclass_accuracy,
    "precision": metrics.multiclass_precision,
    "recall": metrics.multiclass_recall,
    "f1": metrics.multiclass_f1_score,
    "auc": metrics.multiclass_auroc,
}


def score(model: nn.Module, test: Split) -> Scores:
    """Score a model on ``test`` by every metric of ``METRICS``, each in 0 ... 1."""
    probabilities = torch.softmax(logits_of(model, test.images), 1)
    return {
        name: float(metric(probabilities, test.labels, CLASSES, average="micro" if name == "accuracy" else "macro"))
        for name, metric in METRICS.items()
    }
