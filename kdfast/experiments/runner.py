"""Runs what is missing of an experiment: its tuning first, then every arm with the options that did best."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import mean

import torch

from kdfast.bench.report import environment
from kdfast.experiments.arms import Arm
from kdfast.experiments.catalogue import EXPERIMENTS, Experiment
from kdfast.experiments.settings import Settings
from kdfast.experiments.store import FINAL, TUNING, Options, Run, Store
from kdfast.experiments.tasks import CLEAN, Task

__all__ = ["complete", "file_of", "planned"]

FIRST_TUNING_SEED = 1000  # tuning shares no seed with the final runs
NOTED = ("date", "commit", "torch", "python", "processor", "cores", "isa")  # of the environment, in every line


def file_of(folder: Path, name: str) -> Path:
    """The file in ``folder`` that has the runs of the experiment ``name``."""
    return folder / f"experiments-{name}.jsonl"


def planned(experiment: Experiment, settings: Settings) -> int:
    """How many runs an experiment has, tuning included."""
    return len(experiment.arms) * settings.seeds + len(_tuning(experiment, settings))


def complete(
    experiment: Experiment,
    settings: Settings,
    folder: Path,
    *,
    jobs: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> list[Run]:
    """Run what ``folder`` lacks of an experiment, and return its final runs.

    It can be interrupted at any time: the next call resumes with what is missing.

    Args:
        experiment: tuned first, where it is to be tuned.
        settings: how many runs, and how long.
        folder: where the runs are kept.
        jobs: how many processes of one thread each share the work. The numbers do not depend on it.
        advance: called once per planned run, as soon as it is there.

    Raises:
        ResultsError: the experiment's file is in use, or is no file of runs.
    """
    with Store(file_of(folder, experiment.name)) as store:
        tuning = _tuning(experiment, settings)
        _make(experiment, settings, store, tuning, jobs, advance)
        tried = [store.runs[run.key] for run in tuning]
        best = {arm.name: _best([run for run in tried if run.arm == arm.name], arm) for arm in experiment.arms}
        final = [
            Run(arm, FINAL, seed, options, settings.fingerprint)
            for seed in range(settings.seeds)
            for arm, options in best.items()
        ]
        _make(experiment, settings, store, final, jobs, advance)
        return [store.runs[run.key] for run in final]


def _tuning(experiment: Experiment, settings: Settings) -> list[Run]:
    """The runs that options are chosen by; none where there is nothing to choose from, or to choose by."""
    if settings.candidates == 1 or not experiment.tuned:
        return []
    return [
        Run(arm.name, TUNING, FIRST_TUNING_SEED + seed, options, settings.fingerprint)
        for seed in range(settings.tuning_seeds)
        for arm in experiment.arms
        if len(arm.candidates) > 1
        for options in arm.candidates[: settings.candidates]
    ]


def _best(tried: list[Run], arm: Arm) -> Options:
    """The candidate with the best mean score on the validation split: the first of several, or if none was tried."""

    def score(options: Options) -> float:
        return mean([run.scores[CLEAN] for run in tried if run.options == options] or [0.0])

    return max(arm.candidates, key=score)


def _make(
    experiment: Experiment,
    settings: Settings,
    store: Store,
    runs: Iterable[Run],
    jobs: int,
    advance: Callable[[], None],
) -> None:
    missing = []
    for run in runs:
        if run.key in store.runs:
            advance()
        else:
            missing.append(run)
    with _executed(experiment, settings, missing, jobs) as done:
        for run in done:
            store.append(run)
            advance()


@contextmanager
def _executed(experiment: Experiment, settings: Settings, runs: list[Run], jobs: int) -> Iterator[Iterator[Run]]:
    """The runs with their scores, as they end. After a failure, or an interrupt, no further run is begun."""
    if jobs == 1:
        yield (_execute(experiment, settings, run) for run in runs)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        futures: list[Future[Run]] = [pool.submit(_execute_named, experiment.name, settings, run) for run in runs]
        yield (future.result() for future in as_completed(futures))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _execute_named(name: str, settings: Settings, run: Run) -> Run:
    """``_execute`` in another process, to which an experiment's functions cannot be sent."""
    return _execute(EXPERIMENTS[name], settings, run)


def _execute(experiment: Experiment, settings: Settings, run: Run) -> Run:
    """Train the run's arm on one thread, and score it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = _task(experiment.task, run.seed, settings, run.stage == TUNING)
        arm = next(arm for arm in experiment.arms if arm.name == run.arm)
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model = arm.train(task, **run.options)
        seconds = round(time.perf_counter() - start, 2)
        about = {name: value for name, value in environment().items() if name in NOTED}
        return replace(run, scores=task.score(model), about={"seconds": seconds, **about})
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _task(make: Callable[..., Task], seed: int, settings: Settings, validation: bool) -> Task:
    """The task of a seed, which is kept from arm to arm, so that its teachers are trained once."""
    return make(seed, settings, validation=validation)
