"""Every number the demo depends on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

__all__ = ["Schedule", "Settings"]


@dataclass(frozen=True)
class Schedule:
    """AdamW with a cosine decay to zero, over ``epochs`` epochs of 20 steps whatever the number of images is."""

    epochs: int
    learning_rate: float
    weight_decay: float
    steps_per_epoch: int = 20
    batch: int = 60

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Settings:
    """What a run does. The defaults are the published setting."""

    seeds: int = 8
    labelled: int = 60
    device: str = "cpu"
    validation: bool = False  # score on a part of the training split, as while choosing these numbers
    student: Schedule = field(default_factory=lambda: Schedule(epochs=50, learning_rate=1e-2, weight_decay=1e-2))
    teacher: Schedule = field(default_factory=lambda: Schedule(epochs=20, learning_rate=2e-3, weight_decay=1e-2))
    temperature: float = 4.0
    kd_weight: float = 0.9
    smoothing: float = 0.1
    speed_steps: int = 100

    def quick(self) -> Settings:
        """The same in a few seconds, for tests: too short for its numbers to mean much."""
        student, teacher = replace(self.student, epochs=5), replace(self.teacher, epochs=3)
        return replace(self, seeds=min(self.seeds, 2), student=student, teacher=teacher, speed_steps=5)
