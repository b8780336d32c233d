"""Classification metrics over many batches, computed by torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast._optional import import_optional

__all__ = ["FEW_CLASSES", "NAMES", "Metrics", "is_function"]

FEW_CLASSES = ("precision", "recall", "f1", "auroc", "ece")  # whose cost or variance grows with the classes
NAMES = ("accuracy", *FEW_CLASSES, "cross_entropy", "agreement")
MANY_CLASSES = 1000
BINS = 15  # of the calibration error (Guo et al., 2017)


class Metrics:
    """Classification metrics over many batches: call ``update`` with the rows of each, then ``compute``.

    ========== =================================================================================================
    accuracy   the share of rows whose likeliest class is the label
    precision, macro averages: every class weighs the same
    recall, f1
    auroc      area under the ROC curve, one class against the rest, averaged over the classes that occur
    ece        expected calibration error, 15 bins
    cross_entropy  of the labels, in nats
    agreement  the share of rows whose likeliest class is the teacher's
    ========== =================================================================================================

    Args:
        wanted: names of the above; or a mapping of names to torchmetrics' metrics, which are given probabilities
            (rows, classes) and labels (rows,). None means all of the above, or from 1000 classes on accuracy,
            cross_entropy and agreement.

    Raises:
        ValueError: an unknown name.
        TypeError: a metric of torchmetrics' without a name.
        ImportError: torchmetrics is not installed.
    """

    def __init__(self, wanted: Iterable[str] | Mapping[str, Any] | None = None) -> None:
        if isinstance(wanted, nn.Module):
            raise TypeError(
                "metrics must be names, a mapping of names to torchmetrics' metrics, or a function, got "
                f"{type(wanted).__name__}: give {{name: metric}}"
            )
        self._given = dict(wanted) if isinstance(wanted, Mapping) else {}
        self.names = None if wanted is None else () if self._given else tuple(wanted)
        unknown = set(self.names or ()) - set(NAMES)
        if unknown:
            raise ValueError(f"metrics are {', '.join(NAMES)}; there is no {', '.join(sorted(unknown))}")
        self._package = import_optional("torchmetrics", "evaluation", extra="demo")
        self._metrics: dict[str, Any] = {}
        for metric in self._given.values():
            metric.reset()

    @property
    def need_teacher(self) -> bool:
        """Whether ``update`` needs the teacher's classes, for the agreement."""
        return self.names is None or "agreement" in self.names

    def update(self, logits: Tensor, labels: Tensor | None, teacher: Tensor | None) -> None:
        """Add the rows of a batch.

        Args:
            logits: (rows, classes), the student's.
            labels: (rows,) class indices; None if they are not known.
            teacher: (rows,) the teacher's likeliest classes; None if they are not known.
        """
        if teacher is not None and self._wants("agreement", logits.shape[-1]):
            self._metric("agreement", logits).update((logits.argmax(-1) == teacher).float())
        if labels is None or not len(labels):
            return
        probabilities = logits.float().softmax(-1)
        for metric in self._given.values():
            metric.to(logits.device).update(probabilities, labels)
        for name in NAMES[:-1]:
            if self._wants(name, logits.shape[-1]):
                if name == "cross_entropy":
                    self._metric(name, logits).update(F.cross_entropy(logits.float(), labels, reduction="none"))
                    continue
                self._metric(name, logits).update(probabilities, labels)
                if name == "auroc":
                    self._metric("support", logits).update(probabilities, labels)

    def compute(self) -> dict[str, float]:
        """The metrics by name, over all rows so far. ``auroc`` is NaN if only one class occurs."""
        found = {name: float(metric.compute()) for name, metric in self._given.items()}
        for name, metric in self._metrics.items():
            if name == "auroc":
                found[name] = _auroc(metric, self._metrics["support"])
            elif name != "support":
                found[name] = float(metric.compute())
        return found

    def _wants(self, name: str, classes: int) -> bool:
        return name in self.names if self.names is not None else classes < MANY_CLASSES or name not in FEW_CLASSES

    def _metric(self, name: str, logits: Tensor) -> Any:
        if name not in self._metrics:
            self._metrics[name] = _make(self._package, name, logits.shape[-1]).to(logits.device)
        return self._metrics[name]


def is_function(metrics: Any) -> bool:
    """Whether ``metrics`` is a function (distiller, loader). torchmetrics' metrics can be called, too, but are not."""
    return callable(metrics) and not isinstance(metrics, nn.Module)


def _make(package: Any, name: str, classes: int) -> Any:
    multiclass = package.classification
    if name == "accuracy":
        return multiclass.MulticlassAccuracy(classes, average="micro")
    if name == "auroc":
        return multiclass.MulticlassAUROC(classes, average="none")
    if name == "support":
        return multiclass.MulticlassConfusionMatrix(classes)
    if name == "ece":
        return multiclass.MulticlassCalibrationError(classes, n_bins=BINS)
    macro = {"precision": "MulticlassPrecision", "recall": "MulticlassRecall", "f1": "MulticlassF1Score"}
    if name in macro:
        return getattr(multiclass, macro[name])(classes, average="macro")
    return package.MeanMetric()


def _auroc(metric: Any, confusion: Any) -> float:
    """The average over the classes that occur: torchmetrics' own counts an area of 0 for each of the others."""
    count = confusion.compute().sum(1)
    occurs = (count > 0) & (count < count.sum())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No (positive|negative) samples")
        areas = metric.compute()
    return float(areas[occurs].mean()) if bool(occurs.any()) else torch.nan
