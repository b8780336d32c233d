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
    """An arm's scores minus those of its reference, seed by seed."""

    difference: float  # mean
    std: float  # n - 1
    p: float  # of the paired t-test, two-sided
    p_holm: float  # the same, corrected for the comparisons made with it

    @property
    def verdict(self) -> str:
        """What may be said: ``helps``, ``hurts`` or ``no evidence``."""
        if self.p_holm >= ALPHA:
            return "no evidence"
        return "helps" if self.difference > 0 else "hurts"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): reject where it is below alpha, and the family's error is at most alpha.

    ``[0.01, 0.04, 0.03]`` becomes ``[0.03, 0.06, 0.06]``.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare(arms: Mapping[str, Mapping[int, float]], reference: Mapping[int, float]) -> dict[str, Comparison]:
    """Each arm's scores by seed against the reference's, over the seeds that both have.

    The t-test and not Wilcoxon's: ten pairs give the latter no p below .002, which no correction for thirty arms
    survives.

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
