"""The students that are compared: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kdfast import SoftLabels, kd_loss
from kdfast.demo.settings import Settings
from kdfast.demo.train import Objective

__all__ = ["BASELINE", "UPPER_BOUND", "DemoArm", "arms", "objective"]

BASELINE, UPPER_BOUND = "no_kd", "all_labels"


@dataclass(frozen=True)
class DemoArm:
    """How a student is trained. All students have one architecture, schedule and, per seed, initial weights."""

    name: str
    title: str
    all_images: bool = False  # else the labelled ones alone
    teacher: str | None = None  # "own": trained on the labelled images alone. "main": the cache, of all labels
    kd_weight: float = 0.0
    ce_weight: float = 1.0
    smoothing: float = 0.0


def arms(s: Settings) -> tuple[DemoArm, ...]:
    n, kd, ce = s.labelled, s.kd_weight, 1.0 - s.kd_weight
    return (
        DemoArm(BASELINE, f"no KD: {n} labels"),
        DemoArm("smoothing", f"label smoothing: {n} labels", smoothing=s.smoothing),
        DemoArm("kd_own", f"KD, teacher of {n} labels", teacher="own", kd_weight=kd, ce_weight=ce),
        DemoArm("kd_labelled", f"KD from cache: {n} images", teacher="main", kd_weight=kd, ce_weight=ce),
        DemoArm("kd_all", "KD from cache: all images", all_images=True, teacher="main", kd_weight=1.0, ce_weight=0.0),
        DemoArm(UPPER_BOUND, "no KD: all labels", all_images=True),
    )


def objective(arm: DemoArm, labels: Tensor, soft: Mapping[str, SoftLabels], temperature: float) -> Objective:
    """The arm's loss. ``labels`` and ``soft`` (by teacher) have one row per training image."""
    if arm.teacher is None:
        return lambda logits, rows: F.cross_entropy(logits, labels[rows], label_smoothing=arm.smoothing)
    teacher = soft[arm.teacher]

    def distil(logits: Tensor, rows: Tensor) -> Tensor:
        return kd_loss(
            logits,
            teacher[rows],
            labels[rows] if arm.ce_weight else None,  # without a CE term no label is touched
            temperature=temperature,
            kd_weight=arm.kd_weight,
            ce_weight=arm.ce_weight,
        )

    return distil
