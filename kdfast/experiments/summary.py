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
    """The final runs of one arm.

    Attributes:
        arm: the arm.
        scores: accuracies by test and seed.
        options: those that it was run with.
        comparisons: with the experiment's references, by their names, on the clean test.
    """

    arm: Arm
    scores: dict[str, dict[int, float]]
    options: Options
    comparisons: dict[str, Comparison]

    def mean(self, test: str = CLEAN) -> float:
        """The mean accuracy over seeds."""
        return mean(self.scores[test].values())

    def std(self, test: str = CLEAN) -> float:
        """The standard deviation over seeds, with n - 1; 0 for a single seed."""
        values = list(self.scores[test].values())
        return stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Summary:
    """The results of one experiment, as the report shows them.

    Attributes:
        experiment: the experiment.
        arms: those with results, by name, in the experiment's order.
        seeds: how many every arm has at least.
        tuning_runs: how many runs the options were chosen by.
        runs: the final ones.
    """

    experiment: Experiment
    arms: dict[str, ArmSummary]
    seeds: int
    tuning_runs: int
    runs: tuple[Run, ...]

    @property
    def tests(self) -> list[str]:
        """The names of the tests, the clean one first."""
        return list(next(iter(self.arms.values())).scores)


def summaries(folder: Path) -> list[Summary]:
    """Summarise every experiment that has final runs in ``folder``.

    Raises:
        ResultsError: a file there is no file of runs.
    """
    found = ((experiment, read_runs(file_of(folder, name))) for name, experiment in EXPERIMENTS.items())
    return [summarise(experiment, runs) for experiment, runs in found if _final(runs)]


def summarise(experiment: Experiment, runs: Sequence[Run]) -> Summary:
    """Summarise an experiment's runs that may be averaged.

    They have the settings of the last run, and of each arm the options of its last run.
    """
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
    """The comparisons with ``reference`` of the arms that share enough seeds with it."""
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
    """Students that were trained from one kind of labels for the same number of epochs.

    Attributes:
        title: the labels' name in the report.
        epochs: of training.
        seeds: how many students there are.
        cross_entropy: mean, of held-out text, in nats per token.
        std: of the cross-entropy over seeds.
        comparison: by how much the cross-entropy is below that without KD.
    """

    title: str
    epochs: int
    seeds: int
    cross_entropy: float
    std: float
    comparison: Comparison | None


def language_rows(folder: Path) -> list[LanguageRow]:
    """Read the language model's students in ``folder``, by epochs and kind of labels; none if the file is missing.

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
    """A row for each kind of labels that has enough seeds."""
    found = {arm: losses[arm] for arm in TITLES if len(losses[arm]) >= FEWEST_PAIRS}
    # Of a loss the lower is the better.
    gains = {arm: {seed: -loss for seed, loss in by_seed.items()} for arm, by_seed in found.items()}
    baseline = gains.pop(BASELINE, None)
    versus = {} if baseline is None else compare(gains, baseline)
    return [
        LanguageRow(TITLES[arm], epochs, len(values), mean(values), stdev(values), versus.get(arm))
        for arm, values in ((arm, list(by_seed.values())) for arm, by_seed in found.items())
    ]
