"""Training throughput by where the teacher's labels come from, measured interleaved in one process."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import kdfast.cache
from kdfast import kd_loss
from kdfast.demo import models
from kdfast.demo.data import Split
from kdfast.demo.labels import read
from kdfast.demo.settings import Settings
from kdfast.demo.train import Objective, sweep

__all__ = ["SOURCES", "throughput"]

SOURCES = {
    "none": "no teacher (CE)",
    "memory": "cache, gathered once",
    "cache": "cache, gathered per batch",
    "live": "teacher run in the loop",
}


def throughput(teacher: nn.Module, path: Path, train: Split, settings: Settings) -> dict[str, float]:
    """Measure the student's training in samples per second, for each of ``SOURCES``: the median over the passes."""
    objectives = _objectives(teacher, path, train, settings.temperature)
    rows = torch.arange(len(train), device=train.images.device)
    student = models.build(models.student, 0, settings.device)
    passes = max(2, settings.speed_steps * settings.student.batch // len(train))
    seconds: dict[str, list[float]] = {name: [] for name in SOURCES}
    for _ in range(1 + passes):  # interleaved, so that a busy moment does not hit one source alone
        for name in SOURCES:
            seconds[name].append(sweep(student, train.images, rows, objectives[name], settings.student))
    return {name: len(train) / median(times[1:]) for name, times in seconds.items()}


def _objectives(teacher: nn.Module, path: Path, train: Split, temperature: float) -> dict[str, Objective]:
    cache, labels = kdfast.cache.open(path), read(path, train)
    device = train.images.device

    def per_batch(logits: Tensor, rows: Tensor) -> Tensor:
        batch = cache.gather(train.pixels[rows.cpu()])
        return kd_loss(logits, batch.to(device), temperature=temperature)

    return {
        "none": lambda logits, rows: nn.functional.cross_entropy(logits, train.labels[rows]),
        "memory": lambda logits, rows: kd_loss(logits, labels[rows], temperature=temperature),
        "cache": per_batch,
        "live": lambda logits, rows: kd_loss(
            logits, models.logits_of(teacher, train.images[rows]), temperature=temperature
        ),
    }
