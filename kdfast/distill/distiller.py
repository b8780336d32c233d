"""``Distiller``: trains a student from a teacher, a cache, or several of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdfast._paths import local_folder
from kdfast.distill.arguments import FitOptions, check_arguments, check_device, check_inputs, check_loader
from kdfast.distill.counting import Counting
from kdfast.distill.fields import Fields, split, to_device
from kdfast.distill.fitting import Fit
from kdfast.distill.freezing import freeze, frozen_norms
from kdfast.distill.metrics import is_function
from kdfast.distill.objective import KD, FloorWatch, check_first
from kdfast.distill.optimizer import LEARNING_RATE, Optimizers, Schedule, optimizer_of, schedule_of
from kdfast.distill.parallel import unwrap
from kdfast.distill.state import Record
from kdfast.distill.step import Objective, Step
from kdfast.distill.teachers import Teachers, owner
from kdfast.models import apply, decoder_mask, device_of, is_encoder_decoder

__all__ = ["Distiller"]

SCHEDULED = ("lr", "momentum", "betas")  # the options of an optimizer that PyTorch's schedulers change


class Distiller:
    """Trains ``student`` to match the outputs of ``teacher``::

        distiller = kdfast.Distiller(student, teacher, temperature=2.0, kd_weight=0.5, ce_weight=0.5)
        history = distiller.fit(loader, epochs=20, eval_loader=test)

    or, in your own training loop::

        loss = distiller.step(batch)
        loss.backward()

    A batch is a pair (inputs, labels), inputs alone, or a mapping that holds the models' keyword arguments and
    ``labels`` and ``key``. ``kdfast.cache.CacheDataset`` pairs such a batch with labels from a cache. For any other
    layout, ``inputs``, ``labels`` and ``key`` are functions that return the parts of a batch. Teachers run in
    evaluation mode and without gradients, whatever mode they are in.

    Args:
        student: a module whose output is logits, or has ``logits``. Its parts are trained in the mode they are in. A
            student that is in evaluation mode as a whole is put in training mode for ``fit``.
        teacher: a module, a function of the student's arguments, a ``CacheReader``, or a tuple of these. None if
            batches bring labels from a cache. If they do not either, the loss is cross-entropy on the labels.
        objective: a function of a ``Step`` that returns the mean loss over the rows that count; ``KD(**options)`` if
            None. A module is trained with the student, and anything that has a ``state_dict`` is saved in checkpoints.
            If it has ``ignore_index`` and ``shift``, they are in a dict attribute ``options``.
        optimizer: a function that makes an optimizer of a list of parameters, or an optimizer. AdamW if None.
        lr: AdamW's learning rate.
        schedule: "constant", "cosine", ``inverse_decay(...)``, or a function (optimizer, steps_per_epoch, epochs) that
            returns one of PyTorch's schedulers. It moves at every optimiser step; ``ReduceLROnPlateau`` at evaluations.
        freeze: patterns of the student's parameters to freeze, as ``kdfast.distill.freeze`` takes them.
        inputs, labels, key: functions of a batch that return the models' arguments, the class indices or
            probabilities, and the records' keys in the cache.
        outputs: a function of a model's output and the batch that returns its logits, (..., classes), such as
            ``lambda output, batch: output[0]``. It is called for student and teachers alike.
        mask: the name of the field, or a function of a batch, that says which rows of the logits are real: a bool each,
            or 0 or 1. By default ``attention_mask``; for an encoder-decoder, whose rows are its decoder's,
            ``decoder_attention_mask``, or where the labels are not -100. A function that returns None: all are.
        cache_mask: for a cache that was captured with ``mask``: the same function of a batch, a bool, or 0 or 1, for
            each row, which says which rows the cache has. The others have no label and do not count.
        compare_targets: compare the batch's labels with the targets that a cache was captured with, and raise if they
            are not the same. On another device than the CPU that is done for the first batches. False for labels that
            are meant to differ, such as noisy ones.
        amp: the dtype of autocast for student and teacher: torch.bfloat16, or torch.float16 with gradient scaling.
        accumulate: the number of batches of an optimiser step. The gradient is that of one batch with all their rows.
            Rows that a boolean ``row_weight`` excludes still count in a batch's share of these rows.
        clip_norm: the largest norm that the gradient may have.
        compile: run the student through ``torch.compile`` while it is trained.
        folder: where ``fit`` writes its log, curves and checkpoints. If None it writes nothing.
        device: where student, teachers and objective are moved. If None they stay where they are, and batches are
            moved to the student's device. When the student is moved later, what was on its device follows it.
        options: options of ``KD``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was passed and what was wanted.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any = None,
        *,
        objective: Objective | None = None,
        optimizer: Optimizers | Optimizer | None = None,
        lr: float = LEARNING_RATE,
        schedule: str | Schedule = "constant",
        freeze: Sequence[Any] = (),
        inputs: Callable[[Any], Any] | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
        key: Callable[[Any], Sequence[Any]] | None = None,
        outputs: Callable[[Any, Any], Any] | None = None,
        mask: str | Callable[[Any], Any] | None = None,
        cache_mask: Callable[[Any], Any] | None = None,
        compare_targets: bool = True,
        amp: torch.dtype | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        compile: bool = False,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        check_arguments(student, objective, amp, accumulate, clip_norm, options)
        check_device(device)
        self.student = student
        self.objective: Objective = KD(**options) if objective is None else objective
        if mask is None and is_encoder_decoder(student):
            mask = decoder_mask
        self.fields = Fields(inputs=inputs, labels=labels, key=key, outputs=outputs, mask=mask, cache_mask=cache_mask)
        ignored = Counting.of(self.objective).ignore_index
        ignored = ignored if isinstance(ignored, int) else -100
        self.teachers = Teachers(teacher, student, self.fields, ignore_index=ignored, compare_targets=compare_targets)
        others = [x for x in (self.objective, *map(owner, self.teachers.members)) if isinstance(x, nn.Module)]
        for model in (student, *others) if device is not None else ():
            model.to(device)
        self._given_device = None if device is None else torch.device(device)
        self._place = self.device
        self._beside = [x for x in others if device_of(x) == self._place]
        self.frozen_norms = _freeze(student, freeze)
        self.optimizer = optimizer_of(optimizer, lr, student, self.parameters)
        self.schedule = schedule_of(schedule)
        self.amp, self.accumulate, self.clip_norm = amp, accumulate, clip_norm
        self.folder = local_folder(folder)
        self.epoch, self.progress = 0, 0.0
        self._run: Any = torch.compile(student) if compile else student
        self._checked = False
        self.watch = FloorWatch()  # of a run, which makes one of its own

    @property
    def device(self) -> torch.device | None:
        """The student's device, which may change: a trainer may move the student after the distiller was made."""
        # Its weights know the index that "cuda" lacks.
        return device_of(self.student) or self._given_device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained: those of student and objective that require gradients."""
        modules = [x for x in (self.student, self.objective) if isinstance(x, nn.Module)]
        found = {id(x): x for module in modules for x in module.parameters() if x.requires_grad}
        return list(found.values())

    def forward(self, batch: Any, *, strict: bool = True) -> Step:
        """Run student and teacher on a batch. Returns their outputs as a ``Step``.

        Args:
            batch: a batch of the loader.
            strict: with False, a cache that lacks the batch's records yields None as the teacher's output.

        Raises:
            KeyError: a record is not in the cache.
            TypeError, ValueError: a batch that lacks a part, or a teacher's output that requires grad.
        """
        device = self._follow()
        batch = to_device(batch, device)
        inner, _ = split(batch)
        with self.autocast():
            student = self._student(inner)
            teacher = self.teachers(batch, student, device, strict)
        labels = self.fields.labels_of(inner)
        return Step(student, teacher, labels, batch, self.epoch, self.progress, self.fields.mask)

    def _follow(self) -> torch.device | None:
        """The student's device, to which all move that were on the student's before."""
        device = self.device
        if device != self._place:
            for model in self._beside:
                model.to(device)
            self._place = device
        return device

    def _student(self, batch: Any) -> Any:
        arguments = self.fields.arguments(batch, self.student)
        try:
            output = apply(self._run if torch.is_grad_enabled() else self.student, arguments)
        except TypeError as error:
            check_inputs(arguments, error)
            raise
        return output if self.fields.outputs is None else self.fields.outputs(output, batch)

    def step(self, batch: Any) -> Tensor:
        """The loss of a batch: a scalar with a gradient for student and objective."""
        return self.loss(self.forward(batch))

    def loss(self, step: Step) -> Tensor:
        """The objective of a ``Step`` that ``forward`` returned, a scalar.

        Raises:
            ValueError: at the first call, values that would train silently and wrongly, such as probabilities instead
                of logits.
        """
        if not self._checked:
            models = () if self.fields.outputs is not None else (self.student, *self.teachers.members)
            check_first(step, self.objective, models)
            self._checked = True
        with self.autocast():
            self.watch.see(self.objective, step)
            return self.objective(step)

    def autocast(self) -> Any:
        """A context manager: autocast to the dtype ``amp`` on the student's device, or nothing if ``amp`` is None."""
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
        """Train the student.

        With a ``folder``, ``fit`` writes ``last.pt``, ``best.pt``, ``log.jsonl`` and ``curves.png`` there. A run that
        was stopped or killed resumes from ``last.pt``, says so on standard error, and ends with the same weights bit by
        bit. A run of other options, of another teacher or on other data is refused; the number of epochs may grow, and
        the student's initial weights, the device, workers and what is logged may differ. What objects of one's own
        count in training belongs in their ``state_dict``. ``best.pt`` is the best student's ``state_dict``, which
        ``kdfast.distill.load_best(folder)`` reads and checks. Without a folder a second call continues training, with a
        schedule that starts over.

        A run on a cache's labels warns, once, if the student comes about as near to them as they are to the teacher:
        ``CacheInfo.floor`` is that distance, and such labels hold it back.

        Args:
            loader: batches to train on; an epoch is one pass over them.
            epochs: the number of epochs in all, including those before a run was resumed.
            eval_loader: batches to evaluate on.
            eval_every: the number of epochs between evaluations.
            patience: the number of evaluations without a better ``monitor`` after which training stops, with the best
                student's weights. If None, training does not stop early, and the last step's weights stay.
            monitor: the name of a number in the records. Higher is better, except for loss, cross_entropy and ece, and
                for a name with a minus before it.
            metrics: names of ``kdfast.distill.metrics``, torchmetrics' metrics by name, or a function
                (distiller, eval_loader) that returns numbers by name. If None, all that suit the number of classes.
            checkpoint_every: the number of optimiser steps between checkpoints. If None there is one per epoch.
            log_every: the number of optimiser steps between lines of the log.
            resume: resume from the folder's ``last.pt``, if there is one. False overwrites it.
            progress: show how far it is on standard error: a bar on a terminal, elsewhere a line a minute.
            on_epoch: a function that is called with each record, before the checkpoint is written.

        Returns:
            A record per epoch: losses, learning rate, speed, memory, and the metrics of an evaluation if there was one.

        Raises:
            FloatingPointError: a loss that is not finite, with the epoch, the step and the last checkpoint. The
                student's weights are as before that step; its running statistics have seen the batch.
            ValueError: an empty loader, a checkpoint of another run, with all that differs, persistent workers with a
                ``folder``, ``ReduceLROnPlateau`` without a number to monitor, or a batch that does not fit.
            CheckpointError: ``last.pt`` is damaged.
            ImportError: torchmetrics is not installed, and there is an ``eval_loader``.
        """
        options = FitOptions(
            epochs, eval_every, patience, monitor, metrics, checkpoint_every, log_every, resume, progress, on_epoch
        )
        check_loader("fit", loader)
        if eval_loader is not None and not is_function(metrics):
            check_loader("eval_loader", eval_loader)
        groups = self.optimizer.param_groups
        before = [{name: group[name] for name in SCHEDULED if name in group} for group in groups]
        try:
            return Fit(self, loader, eval_loader, options).run()
        finally:
            for group, values in zip(self.optimizer.param_groups, before, strict=True):
                group.update(values)
                group.pop("initial_lr", None)


def _freeze(student: nn.Module, patterns: Sequence[Any]) -> list[nn.Module]:
    """Freeze parameters; returns the modules whose running statistics are frozen with them."""
    return frozen_norms(unwrap(student), set(freeze(unwrap(student), patterns))) if patterns else []
