"""An experiment's runs, put together arm by arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from kdfast.experiments.arm import Arm
from kdfast.experiments.catalogue import EXPERIMENTS, Experiment
from kdfast.experiments.runner import file_of
from kdfast.experiments.runs import FINAL, Options, Run
from kdfast.experiments.statistics import FEWEST_PAIRS, Comparison, compare
from kdfast.experiments.store import read_runs
from kdfast.experiments.tasks import CLEAN

__all__ = ["ArmSummary", "Summary", "summaries", "summarise"]


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
