"""An experiment's runs, put together arm by arm; and SmolLM2's students, which ``benchmarks/frontier`` has trained."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from kdfast.experiments.arms import Arm
from kdfast.experiments.catalogue import EXPERIMENTS, Experiment
from kdfast.experiments.runner import file_of
from kdfast.experiments.statistics import FEWEST_PAIRS, Comparison, compare
from kdfast.experiments.store import FINAL, Options, ResultsError, Run, read_runs
from kdfast.experiments.tasks import CLEAN

__all__ = ["ArmSummary", "LanguageRow", "Summary", "language_rows", "summaries", "summarise"]


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds. ``comparisons`` are with the references, by name, on the clean test."""

    arm: Arm
    scores: dict[str, dict[int, float]]  # by test and seed
    options: Options
    comparisons: dict[str, Comparison]

    def mean(self, test: str = CLEAN) -> float:
        return mean(self.scores[test].values())

    def std(self, test: str = CLEAN) -> float:
        """With n - 1; 0 for a single seed."""
        values = list(self.scores[test].values())
        return stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Summary:
    """What a report says of one experiment."""

    experiment: Experiment
    arms: dict[str, ArmSummary]  # in the experiment's order
    seeds: int  # that every arm has
    tuning_runs: int
    runs: tuple[Run, ...]  # the final ones

    @property
    def tests(self) -> list[str]:
        return list(next(iter(self.arms.values())).scores)


def summaries(folder: Path) -> list[Summary]:
    """Every experiment with results in ``folder``.

    Raises:
        ResultsError: a file there is no file of runs.
    """
    found = ((experiment, read_runs(file_of(folder, name))) for name, experiment in EXPERIMENTS.items())
    return [summarise(experiment, runs) for experiment, runs in found if _final(runs)]


def summarise(experiment: Experiment, runs: Sequence[Run]) -> Summary:
    """Of the runs with the last one's settings, and of each arm's those with its last run's options."""
    current = [run for run in runs if run.settings == runs[-1].settings]
    final = _final(current)
    last = {run.arm: run for run in final}
    final = [run for run in final if run.options == last[run.arm].options]
    arms = [arm for arm in experiment.arms if arm.name in last]
    scores = {arm.name: _scores([run for run in final if run.arm == arm.name]) for arm in arms}
    compared = {arm.name: scores[arm.name][CLEAN] for arm in arms if not arm.bound}
    versus = {name: _versus(compared, name) for name in experiment.references if name in scores}
    found = {
        arm.name: ArmSummary(
            arm,
            scores[arm.name],
            last[arm.name].options,
            {reference: others[arm.name] for reference, others in versus.items() if arm.name in others},
        )
        for arm in arms
    }
    seeds = min(len(by_test[CLEAN]) for by_test in scores.values())
    return Summary(experiment, found, seeds, len(current) - len(_final(current)), tuple(final))


def _final(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.stage == FINAL]


def _scores(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    return {test: {run.seed: run.scores[test] for run in runs} for test in runs[0].scores}


def _versus(scores: dict[str, dict[int, float]], reference: str) -> dict[str, Comparison]:
    """Of the arms that have seeds enough."""
    theirs = scores[reference]
    others = {
        name: ours
        for name, ours in scores.items()
        if name != reference and len(ours.keys() & theirs.keys()) >= FEWEST_PAIRS
    }
    return compare(others, theirs)


# ---- the language model's students ----------------------------------------------------------------------------------


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
