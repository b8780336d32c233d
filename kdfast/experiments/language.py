"""SmolLM2's students: what ``benchmarks/frontier`` has trained, as rows of the report."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from kdfast.experiments.statistics import FEWEST_PAIRS, Comparison, compare
from kdfast.experiments.store import ResultsError

__all__ = ["LanguageRow", "language_rows"]

FILE = "frontier-students.jsonl"
BASELINE = "none"
TITLES = {
    BASELINE: "no KD",
    "dense": "KD, whole distributions",
    "prototype-1": "KD from a cache, 2 bytes per token",
    "topk-4": "KD from a cache, 4 entries renormalised",
}


@dataclass(frozen=True)
class LanguageRow:
    """Students of one kind, after so many epochs. Cross-entropy is that of held-out text, in nats per token."""

    title: str
    epochs: int
    seeds: int
    cross_entropy: float
    std: float
    comparison: Comparison | None  # by how much it is below that of no KD


def language_rows(folder: Path) -> list[LanguageRow]:
    """By epochs and kind; none if ``folder`` does not have the file.

    Raises:
        ResultsError: the file holds something else.
    """
    path = folder / FILE
    if not path.exists():
        return []
    losses: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    try:
        for student in map(json.loads, path.read_text().splitlines()):
            losses[student["epochs"]][student["arm"]][student["seed"]] = student["ce"]
    except (ValueError, TypeError, KeyError) as error:
        raise ResultsError(f"{path} is no file of students: {error!r}") from error
    return [row for epochs in sorted(losses) for row in _rows(epochs, losses[epochs])]


def _rows(epochs: int, losses: dict[str, dict[int, float]]) -> list[LanguageRow]:
    """Of the kinds with seeds enough."""
    found = {arm: losses[arm] for arm in TITLES if len(losses[arm]) >= FEWEST_PAIRS}
    # Of a loss the lower is the better.
    gains = {arm: {seed: -loss for seed, loss in by_seed.items()} for arm, by_seed in found.items()}
    baseline = gains.pop(BASELINE, None)
    versus = {} if baseline is None else compare(gains, baseline)
    return [
        LanguageRow(TITLES[arm], epochs, len(values), mean(values), stdev(values), versus.get(arm))
        for arm, values in ((arm, list(by_seed.values())) for arm, by_seed in found.items())
    ]
