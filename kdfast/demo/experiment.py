"""The whole experiment: teacher, cache, every arm under every seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kdfast import SoftLabels
from kdfast.demo import labels, models
from kdfast.demo.arms import DemoArm, arms, objective
from kdfast.demo.data import load, pick_labelled
from kdfast.demo.labels import CacheSize
from kdfast.demo.metrics import Scores, score
from kdfast.demo.settings import Schedule, Settings
from kdfast.demo.speed import throughput
from kdfast.demo.train import Fit, Objective, fit

__all__ = ["OWN_TEACHER", "TEACHER", "Experiment", "Result", "Runs"]

TEACHER, OWN_TEACHER = "teacher", "own_teacher"


@dataclass
class Runs:
    """The runs of one model under several seeds: scores, and what training took."""

    title: str
    parameters: int
    scores: list[Scores] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Training samples per second over all runs."""
        return sum(fit.samples for fit in self.fits) / sum(fit.seconds for fit in self.fits)


@dataclass
class Result:
    """What the experiment measured.

    Attributes:
        settings: its settings.
        train_images, test_images: sizes of the splits.
        runs: by name: those of the teachers, then of the arms in order.
        cache: the cache's folder.
        cache_size: what the cache takes per sample.
        throughput: samples per second by where the soft labels come from.
    """

    settings: Settings
    train_images: int
    test_images: int
    runs: dict[str, Runs]
    cache: Path
    cache_size: CacheSize
    throughput: dict[str, float]


class Experiment:
    """Trains the teachers and every arm under every seed.

    Args:
        settings: what to run.
        tick: called with the model's name after every epoch.
    """

    def __init__(self, settings: Settings, tick: Callable[[str], None] = lambda name: None) -> None:
        self.settings, self.tick = settings, tick
        self.train, self.test = load(settings.device, validation=settings.validation)
        self.arms = arms(settings)
        self.runs: dict[str, Runs] = {}

    @property
    def epochs(self) -> dict[str, tuple[str, int]]:
        """Title and number of epochs of every model that ``run`` trains, by name."""
        s = self.settings
        teachers = {
            TEACHER: ("teacher, all labels", s.teacher.epochs),
            OWN_TEACHER: (f"teacher, {s.labelled} labels", s.teacher.epochs * s.seeds),
        }
        return {**teachers, **{arm.name: (arm.title, s.student.epochs * s.seeds) for arm in self.arms}}

    def run(self, folder: Path) -> Result:
        """Run the whole experiment, and write the cache into ``folder``."""
        every_row = torch.arange(len(self.train), device=self.train.labels.device)
        teacher = self._teach(TEACHER, every_row, seed=0)
        cache = labels.write(teacher, self.train, folder)
        main = labels.read(cache, self.train)
        for seed in range(self.settings.seeds):
            labelled = pick_labelled(self.train.labels, self.settings.labelled, seed)
            own = self._teach(OWN_TEACHER, labelled, seed)
            soft = {"main": main, "own": SoftLabels.dense(models.logits_of(own, self.train.images))}
            for arm in self.arms:
                self._distil(arm, every_row if arm.all_images else labelled, soft, seed)
        speed = throughput(teacher, cache, self.train, self.settings)
        sizes = len(self.train), len(self.test)
        return Result(self.settings, *sizes, self.runs, cache, labels.size_of(cache), speed)

    def _teach(self, name: str, rows: Tensor, seed: int) -> nn.Module:
        model = models.build(models.teacher, seed, self.settings.device)
        hard = objective(DemoArm(name, name), self.train.labels, {}, 1.0)
        self._fit(name, model, rows, hard, self.settings.teacher, seed)
        return model

    def _distil(self, arm: DemoArm, rows: Tensor, soft: dict[str, SoftLabels], seed: int) -> None:
        model = models.build(models.student, seed, self.settings.device)
        loss = objective(arm, self.train.labels, soft, self.settings.temperature)
        self._fit(arm.name, model, rows, loss, self.settings.student, seed)

    def _fit(
        self,
        name: str,
        model: nn.Module,
        rows: Tensor,
        loss: Objective,
        schedule: Schedule,
        seed: int,
    ) -> None:
        title, _ = self.epochs[name]
        runs = self.runs.setdefault(name, Runs(title, models.parameters(model)))
        tick = partial(self.tick, name)
        runs.fits.append(fit(model, self.train, rows, loss, schedule, seed, test=self.test, tick=tick))
        runs.scores.append(score(model, self.test))
