"""Paired comparisons of arms over seeds, corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import ttest_rel

__all__ = ["ALPHA", "FEWEST_PAIRS", "Comparison", "compare", "holm"]

ALPHA = 0.05
FEWEST_PAIRS = 3  # a t-test of two pairs says nothing


@dataclass(frozen=True)
class Comparison:
    """An arm's scores minus those of its reference, seed by seed.

    Attributes:
        difference: the mean.
        std: the standard deviation, with n - 1.
        p: of the paired t-test, two-sided.
        p_holm: ``p``, corrected for all comparisons with the same reference.
    """

    difference: float
    std: float
    p: float
    p_holm: float

    @property
    def verdict(self) -> str:
        """``helps`` or ``hurts`` where ``p_holm`` is below .05, else ``no evidence``."""
        if self.p_holm >= ALPHA:
            return "no evidence"
        return "helps" if self.difference > 0 else "hurts"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down procedure (1979).

    Rejecting where an adjusted one is below alpha keeps the family-wise error rate at alpha. ``[0.01, 0.04, 0.03]``
    becomes ``[0.03, 0.06, 0.06]``.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare(arms: Mapping[str, Mapping[int, float]], reference: Mapping[int, float]) -> dict[str, Comparison]:
    """Compare each arm's scores by seed with the reference's, over the seeds that both have.

    The test is a paired t-test and not Wilcoxon's, whose p is never below .002 for ten pairs: corrected for thirty
    arms, that is never significant.

    Raises:
        ValueError: an arm shares fewer than three seeds with the reference.
    """
    pairs = {
        name: [(scores[seed], reference[seed]) for seed in scores if seed in reference] for name, scores in arms.items()
    }
    for name, found in pairs.items():
        if len(found) < FEWEST_PAIRS:
            raise ValueError(f"{name} shares {len(found)} seeds with its reference; {FEWEST_PAIRS} are needed")
    differences = {name: [ours - theirs for ours, theirs in found] for name, found in pairs.items()}
    p_values = [_p_value(found) for found in pairs.values()]
    return {
        name: Comparison(mean(found), stdev(found), p, corrected)
        for (name, found), p, corrected in zip(differences.items(), p_values, holm(p_values), strict=True)
    }


def _p_value(pairs: Sequence[tuple[float, float]]) -> float:
    ours, theirs = zip(*pairs, strict=True)
    differences = {a - b for a, b in pairs}
    if len(differences) == 1:  # the test statistic would be 0 / 0, or infinite
        return 1.0 if differences == {0.0} else 0.0
    return float(ttest_rel(ours, theirs).pvalue)
