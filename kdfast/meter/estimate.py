"""The KL of each row from draws, and what the rows of many documents say about their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.labels import SoftLabels, Weights

__all__ = ["QUANTILES", "Measurement", "Rows", "difference", "row_terms"]

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
Z95 = 1.96


def row_terms(logits: Tensor, labels: SoftLabels) -> tuple[Tensor, Tensor]:
    """(rows,) float64 estimates of KL(teacher || model) in nats, and (rows,) bool whether the likeliest ids agree.

    A row's estimate is ``sum(w * (r - 1 - log r))`` over its draws, with r the model's over the teacher's probability
    of the drawn id. The teacher's expectation of r is 1, so that the estimate is unbiased; it is never negative, and
    where model and teacher are near each other its noise is far below that of ``-log r`` ("k3": Schulman,
    "Approximating KL divergence", 2020).

    Args:
        logits: (rows, vocab) the model's, any float dtype.
        labels: what a cache of codec ``scored`` holds of the same rows, on the same device.

    Raises:
        ValueError: labels without the teacher's log-probabilities, of another temperature, or of other rows or columns.
    """
    if not isinstance(labels, Weights) or labels.log_probs is None:
        raise ValueError(f'the labels need log-probabilities: capture with codec="scored", got {labels!r}')
    if labels.temperatures != (1.0,):
        raise ValueError(
            f"the labels are of temperature {labels.temperatures[0]:g}, and the KL is measured at temperature 1: "
            "capture with temperatures=(1.0,)"
        )
    if logits.shape != (len(labels), labels.vocab_size):
        raise ValueError(f"logits must be {(len(labels), labels.vocab_size)}, got {tuple(logits.shape)}")
    row, ids = labels.entry_rows, labels.ids.long()
    lse = logits.float().logsumexp(1)
    log_ratio = logits[row, ids].double() - lse.double()[row] - labels.log_probs.double()
    terms = labels.values.double() * (torch.expm1(log_ratio) - log_ratio)
    terms = torch.where(labels.values == 0.0, 0.0, terms)  # the likeliest id where it was not drawn
    kl = torch.zeros(len(labels), dtype=torch.float64, device=logits.device).index_add(0, row, terms)
    # Of equal ones a model may have any first: it agrees if its likeliest is one of the teacher's likeliest.
    top = torch.full_like(kl, -math.inf).scatter_reduce(0, row, labels.log_probs.double(), "amax")
    likeliest = labels.log_probs.double() == top[row]
    agree = torch.zeros(len(labels), dtype=torch.bool, device=logits.device)
    agree[row[likeliest & (ids == logits.argmax(1)[row])]] = True
    return kl, agree


@dataclass(frozen=True)
class Rows:
    """What was measured of one model, row by row, in the order of the documents."""

    kl: NDArray[np.float64]  # nats
    agree: NDArray[np.bool_]
    document: NDArray[np.int64]  # ascending: which document each row is of
    ce: NDArray[np.float64]  # the model's cross-entropy on the next token; NaN where there is none

    @classmethod
    def cat(cls, parts: Sequence[Rows]) -> Rows:
        """Concatenate. Raises ``ValueError`` for no part."""
        if not parts:
            raise ValueError("nothing was measured: there are no documents")
        names = ("kl", "agree", "document", "ce")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def measurement(self, name: str, teacher_ce: float | None, exact: bool) -> Measurement:
        """Sum the rows up: the mean KL and its error over documents, quantiles, agreement and perplexity ratio.

        Args:
            name: of the model.
            teacher_ce: the teacher's mean cross-entropy on the same next tokens, in nats; None where it is not known.
            exact: whether each row's KL is exact, or estimated from draws.

        Raises:
            ValueError: rows whose KL is NaN, as a model's NaN logits make it.
        """
        bad = np.isnan(self.kl)
        if bad.any():
            raise ValueError(
                f"{bad.sum()} of {len(bad)} rows of {name} have a KL of NaN, the first in document "
                f"{self.document[bad.argmax()]}: the model's logits have NaN there"
            )
        known = ~np.isnan(self.ce)
        ce = float(self.ce[known].mean()) if known.any() else None
        agreement, agreement_error = clustered(self.agree.astype(float), self.document)
        return Measurement(
            name,
            *clustered(self.kl, self.document),
            dict(zip(map(str, QUANTILES), np.quantile(self.kl, QUANTILES).tolist(), strict=True)),
            agreement,
            agreement_error,
            ce,
            None if ce is None or teacher_ce is None else math.exp(ce - teacher_ce),
            len(self.kl),
            len(np.unique(self.document)),
            exact,
        )


@dataclass(frozen=True)
class Measurement:
    """KL(teacher || model) in nats and what goes with it."""

    name: str
    kl: float  # mean over rows
    kl_error: float  # its standard error, over documents: the rows of one are not independent
    quantiles: dict[str, float]  # of the rows' KL; of estimates they contain the noise of the draws
    agreement: float  # share of rows whose likeliest id is the teacher's
    agreement_error: float
    ce: float | None  # the model's cross-entropy on the next tokens
    perplexity_ratio: float | None  # the model's perplexity over the teacher's; None where the teacher's is not known
    rows: int
    documents: int
    exact: bool  # whether each row's KL is exact, or estimated from draws

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of ``kl``."""
        return self.kl - Z95 * self.kl_error, self.kl + Z95 * self.kl_error

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it: numbers that are not finite are None."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def clustered(values: NDArray[np.float64], document: NDArray[np.int64]) -> tuple[float, float]:
    """The mean over rows, and its standard error with documents as the independent units (a ratio estimator's).

    With one document there is no telling, and the error is NaN.
    """
    _, which = np.unique(document, return_inverse=True)
    sizes = np.bincount(which).astype(float)
    mean = float(values.mean())
    if len(sizes) < 2:
        return mean, math.nan
    residuals = np.bincount(which, values) - mean * sizes
    count = len(sizes)
    return mean, float(np.sqrt((residuals**2).sum() * count / (count - 1)) / sizes.sum())


def difference(first: Rows, second: Rows) -> tuple[float, float]:
    """The mean of ``first``'s KL less ``second``'s on the same rows, and its standard error: paired, by document.

    Raises:
        ValueError: the rows are not the same.
    """
    if not np.array_equal(first.document, second.document):
        raise ValueError("models are compared on the same rows: these are of other documents")
    return clustered(first.kl - second.kl, first.document)
