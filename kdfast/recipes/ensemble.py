"""Several teachers as one: their probabilities or their logits, averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import values_are_checked
from kdfast.distill.counting import Counting
from kdfast.distill.objective import KD
from kdfast.distill.step import Step
from kdfast.divergences import Divergence
from kdfast.labels import Ragged, SoftLabels
from kdfast.loss.row_layout import RowLayout
from kdfast.masks import is_mask
from kdfast.models import logits_of
from kdfast.recipes._inputs import IGNORE, counted_rows, dense_logits, several_teachers, soft_labels, widened

__all__ = ["LogitEnsemble", "ProbabilityEnsemble", "label_trust"]

Weights = Sequence[float] | Callable[[Step], Tensor] | None
LINEAR_IN_P = ("forward_kl", "soft_ce")


class ProbabilityEnsemble:
    """KD from the average of the teachers' distributions (Hinton et al. 2015), of models or caches::

        p = sum_k w_k softmax(z_k / T)

    With logits, dense labels or hidden labels, p itself is the teacher, under any divergence but ``logit_mse``. Labels
    that hold a few entries of each row cannot be averaged row by row. With those the loss is
    ``sum_k w_k KL(p_k || q)``, which has the gradient of ``KL(p || q)``, because cross-entropy is linear in the
    teacher. The two losses differ by a constant, the teachers' disagreement. Unbiased labels stay unbiased.

    Args:
        weights: one per teacher, 0 or more, of sum 1; equal ones if None. Or a function of the step giving (..., K)
            weights of each row, such as ``label_trust``, which gets the options' ``shift`` and ``ignore_index``.
        options: ``KD``'s.

    Raises:
        ValueError: the weights are no average; ``logit_mse`` is the divergence; or, when it is called, there is one
            teacher, the teachers' vocabularies differ, or labels of a few entries meet a divergence other than
            forward KL and soft cross-entropy.
    """

    def __init__(self, weights: Weights = None, **options: Any) -> None:
        self.weights, self.options = _checked(weights, options), options
        self.divergence = Divergence.of(options.get("divergence", "forward_kl"))
        KD(**options)
        if self.divergence.name == "logit_mse":
            raise ValueError("logit_mse compares logits, and probabilities are averaged here: use LogitEnsemble")

    def __call__(self, step: Step) -> Tensor:
        outputs = _decoded(step)
        weights = _weights(self.weights, step, len(outputs))
        if all(not isinstance(x, Ragged) for x in outputs):
            return KD(**self.options)(replace(step, teacher=self._average(step, outputs, weights)))
        return self._mixed(step, outputs, weights)

    def _mixed(self, step: Step, outputs: tuple[SoftLabels, ...], weights: Tensor) -> Tensor:
        if self.divergence.name not in LINEAR_IN_P or self.divergence.standardize:
            raise ValueError(
                f"labels of a few entries per row average under {' and '.join(LINEAR_IN_P)}, got "
                f"{self.divergence.name}: their gradient is linear in the teacher's probabilities"
            )
        options = {name: option(step) if callable(option) else option for name, option in self.options.items()}
        given, terms = options.pop("row_weight", None), []
        rows = RowLayout(step.logits, bool(options.get("shift", False)))
        for labels, weight in zip(outputs, weights.to(step.logits.device).unbind(-1), strict=True):
            if given is not None and is_mask(given):  # rows that do not count, rather than weigh nothing
                labels = replace(labels, present=labels.present_mask & (rows.marks(given) != 0.0))
            elif given is not None:
                weight = weight * rows.per_row("row_weight", given).view(rows.shape)
            terms.append(KD(**options, row_weight=weight)(replace(step, teacher=labels)))
        return torch.stack(terms).sum()

    def _average(self, step: Step, outputs: tuple[Any, ...], weights: Tensor) -> Tensor | SoftLabels:
        tau = self.options.get("teacher_temperature")
        tau = KD(**self.options).options["temperature"] if tau is None else tau
        tau = tau(step) if callable(tau) else tau
        tau = tau[..., None] if isinstance(tau, Tensor) and tau.dim() else tau
        logits = _stacked(step, outputs)
        log_probs = (logits / tau).log_softmax(-1).movedim(0, -1)
        return _as_teacher(outputs, tau * (log_probs + weights.to(logits)[..., None, :].log()).logsumexp(-1))


class LogitEnsemble:
    """KD from the average of the teachers' logits, ``z = sum_k w_k z_k``, of models or caches of whole rows.

    Its distribution is the normalised geometric mean of theirs: sharper than the average of probabilities where
    teachers agree, and near 0 wherever one teacher's is.

    Args:
        weights: one per teacher, 0 or more, of sum 1; equal ones if None. Or a function of the step giving (..., K)
            weights of each row, such as ``label_trust``, which gets the options' ``shift`` and ``ignore_index``.
        options: ``KD``'s, with any divergence.

    Raises:
        ValueError: the weights are no average; or, when it is called, there is one teacher, the teachers' vocabularies
            differ, or labels do not hold whole rows.
    """

    def __init__(self, weights: Weights = None, **options: Any) -> None:
        self.weights, self.options = _checked(weights, options), options
        self._objective = KD(**options)

    def __call__(self, step: Step) -> Tensor:
        outputs = _decoded(step)
        weights = _weights(self.weights, step, len(outputs))
        logits = _stacked(step, outputs).movedim(0, -1)
        weights = weights.to(logits)[..., None, :]
        # A weight of 0 must not meet a masked column's -inf.
        weighted = torch.where(weights == 0.0, 0.0, logits * weights)
        return self._objective(replace(step, teacher=_as_teacher(outputs, weighted.sum(-1))))


def label_trust(step: Step, *, shift: bool = False, ignore_index: int = IGNORE) -> Tensor:
    """Weights of K teachers in each row by their cross-entropies on its label (CA-MKD, Zhang et al. 2022)::

        w_k = (1 - softmax_k(CE_k)) / (K - 1)

        ProbabilityEnsemble(label_trust)

    The authors' code divides the sum over teachers by K again: their weight of the loss is to be divided by K here.

    Args:
        step: with two teachers or more, and class indices as labels.
        shift: position i is judged by label i + 1.
        ignore_index: the label of rows that have none; they weigh all teachers alike.

    Returns:
        (..., K) weights, of sum 1 in each row.

    Raises:
        ValueError: the step has fewer than two teachers, or no class indices as labels.
    """
    outputs = several_teachers(step)
    if step.labels is None or step.labels.is_floating_point():
        raise ValueError("label_trust needs class indices as labels, got none")
    labels = Counting(ignore_index, shift).labels(step.labels)
    losses = [_cross_entropy(dense_logits(x, step.logits), labels, ignore_index) for x in outputs]
    return (1.0 - torch.stack(losses, -1).softmax(-1)) / (len(outputs) - 1)


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    classes = labels.flatten().long()
    rows = F.cross_entropy(widened(logits.flatten(0, -2)), classes, ignore_index=ignore_index, reduction="none")
    return rows.view(labels.shape)


def _checked(weights: Weights, options: dict[str, Any]) -> Weights:
    if weights is label_trust:  # it must judge a row by the label that the loss does
        return partial(label_trust, **{name: options[name] for name in ("shift", "ignore_index") if name in options})
    if weights is None or callable(weights):
        return weights
    if not all(w >= 0.0 for w in weights) or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(f"weights of an ensemble must not be negative and must sum to 1, got {list(weights)}")
    return tuple(weights)


def _weights(weights: Weights, step: Step, count: int) -> Tensor:
    """(K,), or (..., K) where a row has its own."""
    if callable(weights):
        rows = weights(step)
        if rows.shape != (*step.logits.shape[:-1], count):
            raise ValueError(
                f"weights of {count} teachers must be {(*step.logits.shape[:-1], count)}, got {tuple(rows.shape)}"
            )
        if values_are_checked() and not bool(((rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() < 1e-4)).all()):
            raise ValueError("weights of an ensemble must not be negative and must sum to 1 in every row")
        return rows.detach()
    if weights is not None and len(weights) != count:
        raise ValueError(f"{count} teachers need as many weights, got {len(weights)}")
    return torch.tensor(weights or [1.0 / count] * count, dtype=torch.float64).to(step.logits.device)


def _decoded(step: Step) -> tuple[Any, ...]:
    """The teachers' logits; or labels of all of them, where one has any, marked absent in rows that do not count."""
    outputs = several_teachers(step)
    labels = [soft_labels(x) for x in outputs]
    if all(x is None for x in labels):
        return outputs
    present = counted_rows(replace(step, labels=None)).flatten()
    rows = [
        SoftLabels.dense(logits_of(x).flatten(0, -2)) if y is None else y for x, y in zip(outputs, labels, strict=True)
    ]
    return tuple(replace(x, present=present) for x in rows)


def _stacked(step: Step, outputs: tuple[Any, ...]) -> Tensor:
    """(K, ..., vocabulary) logits."""
    logits = [dense_logits(x, step.logits) for x in outputs]
    if len({x.shape for x in logits}) > 1:
        raise ValueError(f"teachers of an ensemble must agree in shape, got {[tuple(x.shape) for x in logits]}")
    return torch.stack([widened(x) for x in logits])


def _as_teacher(outputs: tuple[Any, ...], logits: Tensor) -> Tensor | SoftLabels:
    """``logits``, or labels of them where the outputs are labels."""
    if not isinstance(outputs[0], SoftLabels):
        return logits
    return SoftLabels.dense(logits.flatten(0, -2), present=outputs[0].present)
