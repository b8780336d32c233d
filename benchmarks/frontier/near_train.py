"""Training a near student from one arm's labels, and measuring it on held-out windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from distances import Distance
from families import load_family
from labels import Labels, make_labels
from near_student import NearStudent
from torch import Tensor, nn
from torch.nn import functional as F

import kdfast
from kdfast.bench.teacher import Corpus

__all__ = ["Trainer"]

FLOOR = 0.05  # of the learning rate, at the end
WARM_UP = 0.1  # of the steps
UNTRAINED = "start"
Loss = Callable[[kdfast.Head, list[int]], Tensor]  # of a student's rows over these windows


class Trainer:
    """Trains and measures the students of one distance, which share their start."""

    def __init__(self, folder: Path, distance: Distance, corpus: Corpus) -> None:
        self.folder, self.distance, self.corpus = folder, distance, corpus
        self.inputs = self._start(0).inputs(corpus.ids)

    def measure(self, arm: str, seed: int) -> dict[str, float]:
        """Train a student on the labels of ``arm``. Returns its held-out KL and cross-entropy, and its labels' size.

        The student's start and the order of batches depend on the seed alone, so that arms can be compared in pairs.
        """
        student = self._start(seed)
        about: dict[str, float] = {}
        if arm != UNTRAINED:
            loss, about = self._loss(arm, seed)
            self._train(student, loss, seed)
        return self._evaluate(student) | about

    def _start(self, seed: int) -> NearStudent:
        torch.manual_seed(1000 + seed)
        return NearStudent(load_family(self.folder, self.distance.family), self.distance)

    def _loss(self, arm: str, seed: int) -> tuple[Loss, dict[str, float]]:
        corpus = self.corpus
        if arm == "dense":
            return lambda head, windows: kdfast.kd_loss(head, corpus.logits(torch.tensor(windows))), {}
        if arm == "none":  # no KD: the text alone
            return lambda head, windows: _cross_entropy(head, corpus.targets[windows]), {}
        part = self.folder / f"labels-{self.distance.family}-{self.distance.corpus}-{self.distance.windows}"
        part.mkdir(exist_ok=True)
        labels = make_labels(corpus, part, arm, seed, self.distance.windows)
        about = {name: getattr(labels, name) for name in ("bytes_per_token", "entries_per_token", "model_bytes")}
        return lambda head, windows: _from_labels(head, labels, windows), about

    def _train(self, student: NearStudent, loss: Loss, seed: int) -> None:
        distance = self.distance
        steps = distance.windows // distance.batch
        order = torch.randperm(distance.windows, generator=torch.Generator().manual_seed(7700 + seed))
        optimizer = torch.optim.AdamW(student.trained, lr=distance.rate, weight_decay=0, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for batch in order[: steps * distance.batch].split(distance.batch):
            loss(student.head(self.inputs[batch]), batch.tolist()).backward()
            student.before_step()
            nn.utils.clip_grad_norm_(student.trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            student.after_step()
            schedule.step()

    @torch.no_grad()
    def _evaluate(self, student: NearStudent) -> dict[str, float]:
        """Mean held-out KL(teacher, student) and cross-entropy in nats."""
        kl = ce = 0.0
        held_out = range(self.corpus.train, len(self.corpus))
        for window in held_out:
            part = slice(window, window + 1)
            head = student.head(self.inputs[part])
            logits = head.hidden @ head.weight.T
            kl += kdfast.kd_loss(logits, self.corpus.logits(part)).item() / len(held_out)
            ce += F.cross_entropy(logits, self.corpus.targets[part].reshape(-1)).item() / len(held_out)
        return {"kl": kl, "ce": ce}


def _from_labels(head: kdfast.Head, labels: Labels, windows: list[int]) -> Tensor:
    target = labels.at(windows)
    if isinstance(target, tuple):
        raise NotImplementedError("labels with a residual are for students from scratch")
    return kdfast.kd_loss(head, target, divergence="soft_ce" if target.kind == "weights" else "forward_kl")


def _cross_entropy(head: kdfast.Head, targets: Tensor) -> Tensor:
    return F.cross_entropy(head.hidden @ head.weight.T, targets.reshape(-1))


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a line down."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, max(FLOOR, 1 - (step - warm) / max(1, steps - warm)))
