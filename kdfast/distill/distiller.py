"""``Distiller``: trains a student from a teacher, a cache, or several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdfast.distill.arguments import FitOptions, check_arguments
from kdfast.distill.fields import Fields, split, to_device
from kdfast.distill.fitting import Fit
from kdfast.distill.freezing import freeze, frozen_norms
from kdfast.distill.objective import KD, check_first
from kdfast.distill.optimizer import Optimizers, Schedule, optimizer_of, schedule_of
from kdfast.distill.parallel import unwrap
from kdfast.distill.state import Record
from kdfast.distill.step import Objective, Step
from kdfast.distill.teachers import Teachers, owner
from kdfast.models import apply, device_of

__all__ = ["Distiller"]


class Distiller:
    """Trains ``student`` to say what ``teacher`` says::

        distiller = kdfast.Distiller(student, teacher, temperature=2.0, kd_weight=0.5, ce_weight=0.5)
        history = distiller.fit(loader, epochs=20, eval_loader=test)

    or, in a loop of one's own::

        loss = distiller.step(batch)
        loss.backward()

    A batch is a pair (inputs, labels), inputs alone, a mapping of the models' keywords with ``labels`` and ``key``, or
    what ``kdfast.cache.CacheDataset`` collates, with one of these inside; else ``inputs``, ``labels`` and ``key`` find
    its parts. Teachers run in evaluation mode and without gradients, whatever mode they are in.

    Args:
        student: any module whose output is logits, or has them. It is trained in the mode that its parts are in; one
            that is in evaluation mode as a whole is put in training mode first.
        teacher: a module, a function of what the student is called with, a ``CacheReader``, or a tuple of these. None
            where batches bring their labels from a cache; without these, too, the loss is the labels' cross-entropy.
        objective: a function of a ``Step`` giving the mean over the rows that count. ``KD(**options)`` if None. A
            module is trained along, and whatever has a ``state_dict`` is in checkpoints. Its ``ignore_index`` and
            ``shift``, if it has any, are in a dict ``options``.
        optimizer: makes one of the parameters that are trained, or is one. AdamW if None.
        lr: AdamW's.
        schedule: "constant", "cosine", ``inverse_decay(...)``, or a function (optimizer, steps_per_epoch, epochs)
            giving a scheduler of PyTorch's, which moves at every optimiser step (``ReduceLROnPlateau``: evaluation).
        freeze: patterns of the student's parameters, as ``freeze`` takes them.
        inputs, labels, key: functions of a batch: what the models are called with, the class indices or probabilities,
            and the records' keys in the cache.
        amp: the dtype of autocast, of student and teacher: torch.bfloat16, or torch.float16, whose gradients are
            scaled.
        accumulate: batches of an optimiser step. Its gradient is that of one batch of all their rows. Rows that a bool
            ``row_weight`` leaves out count in a batch's share all the same.
        clip_norm: of the gradient, at most.
        compile: run the student through ``torch.compile`` while it is trained.
        folder: where ``fit`` leaves its log, curves and checkpoints. Nothing is written if None.
        device: to which student, teachers and objective are moved. If None they stay where they are, and batches go to
            the student.
        options: ``KD``'s.

    Raises:
        TypeError, ValueError: arguments that do not fit, naming what was passed and what was wanted.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any = None,
        *,
        objective: Objective | None = None,
        optimizer: Optimizers | Optimizer | None = None,
        lr: float = 1e-3,
        schedule: str | Schedule = "constant",
        freeze: Sequence[Any] = (),
        inputs: Callable[[Any], Any] | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
        key: Callable[[Any], Sequence[Any]] | None = None,
        amp: torch.dtype | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        compile: bool = False,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        check_arguments(student, objective, amp, accumulate, clip_norm, options)
        self.student = student
        self.objective: Objective = KD(**options) if objective is None else objective
        self.fields = Fields(inputs, labels, key)
        self.teachers = Teachers(teacher, student, self.fields)
        for model in (student, self.objective, *map(owner, self.teachers.members)) if device is not None else ():
            if isinstance(model, nn.Module):
                model.to(device)
        # Of "cuda" the weights say which one.
        self.device = device_of(student) or (None if device is None else torch.device(device))
        self.frozen_norms = _freeze(student, freeze)
        self.optimizer = optimizer_of(optimizer, lr, student, self.parameters)
        self.schedule = schedule_of(schedule)
        self.amp, self.accumulate, self.clip_norm = amp, accumulate, clip_norm
        self.folder = None if folder is None else Path(folder)
        self.epoch, self.progress = 0, 0.0
        self._run: Any = torch.compile(student) if compile else student
        self._checked = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained: the student's and the objective's parameters that are not frozen."""
        modules = [x for x in (self.student, self.objective) if isinstance(x, nn.Module)]
        found = {id(x): x for module in modules for x in module.parameters() if x.requires_grad}
        return list(found.values())

    def forward(self, batch: Any, *, strict: bool = True) -> Step:
        """What student and teacher say of a batch. Not ``strict``: a teacher that does not know its records says None.

        Raises:
            KeyError: a record is not in the cache.
            TypeError, ValueError: a batch without what is needed of it, or a teacher's output that requires grad.
        """
        batch = to_device(batch, self.device)
        inner, _ = split(batch)
        with self.autocast():
            student = apply(self._run if torch.is_grad_enabled() else self.student, self.fields.arguments(inner))
            teacher = self.teachers(batch, student, self.device, strict)
        return Step(student, teacher, self.fields.labels_of(inner), batch, self.epoch, self.progress)

    def step(self, batch: Any) -> Tensor:
        """The loss of a batch: a scalar, to be differentiated."""
        return self.loss(self.forward(batch))

    def loss(self, step: Step) -> Tensor:
        """The objective of what ``forward`` gave."""
        if not self._checked:
            check_first(step, self.objective)
            self._checked = True
        with self.autocast():
            return self.objective(step)

    def autocast(self) -> Any:
        """Of the dtype ``amp``, on the student's device."""
        device = self.device or torch.device("cpu")
        return nullcontext() if self.amp is None else torch.autocast(device.type, self.amp)

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int,
        eval_loader: Iterable[Any] | None = None,
        eval_every: int = 1,
        patience: int | None = None,
        monitor: str = "accuracy",
        metrics: Any = None,
        checkpoint_every: int | None = None,
        log_every: int = 50,
        resume: bool = True,
        progress: bool = True,
        on_epoch: Callable[[Record], object] | None = None,
    ) -> list[Record]:
        """Train, and return a record per epoch: losses, rates, speed, memory, and the metrics where it was evaluated.

        With a ``folder`` there are ``last.pt`` and ``best.pt``, ``log.jsonl`` and ``curves.png`` afterwards, and a run
        that was stopped or killed goes on from ``last.pt``, to the same weights bit by bit. A second call without one
        trains on, with a schedule that begins anew.

        Args:
            loader: of batches; an epoch is one pass.
            epochs: in all, those of a run that goes on included.
            eval_loader: of batches to evaluate on.
            eval_every: epochs from one evaluation to the next.
            patience: evaluations without a better ``monitor`` until training stops. The student is the best one then;
                if None, that of the last step.
            monitor: a name in the records. More is better, but for loss, cross_entropy and ece, and where a minus comes
                before the name.
            metrics: names of ``kdfast.distill.metrics``, torchmetrics' metrics by name, or a function
                (distiller, eval_loader) giving numbers by name. All that suit the number of classes if None.
            checkpoint_every: optimiser steps from one checkpoint to the next. If None there is one per epoch.
            log_every: optimiser steps from one line of the log to the next.
            resume: go on from the folder's ``last.pt``, if it has one; False overwrites it.
            progress: a bar on standard error, where that is a terminal.
            on_epoch: is called with each record, before the checkpoint.

        Raises:
            FloatingPointError: a loss that is not finite, naming epoch, step and the last checkpoint. The student's
                weights are as they were before that step; its running statistics have seen the batch.
            ValueError: an empty loader, a checkpoint of another run, persistent workers with a ``folder``,
                ``ReduceLROnPlateau`` without anything to watch; and whatever a batch was refused for.
            ImportError: torchmetrics is not installed, and there is an ``eval_loader``.
        """
        options = FitOptions(
            epochs, eval_every, patience, monitor, metrics, checkpoint_every, log_every, resume, progress, on_epoch
        )
        rates = [group["lr"] for group in self.optimizer.param_groups]
        try:
            return Fit(self, loader, eval_loader, options).run()
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
                group.pop("initial_lr", None)


def _freeze(student: nn.Module, patterns: Sequence[Any]) -> list[nn.Module]:
    """Freezes, and gives the parts with statistics that have become still."""
    return frozen_norms(unwrap(student), set(freeze(unwrap(student), patterns))) if patterns else []
