"""A run of training: epochs, evaluation, early stopping, checkpoints, and resuming from them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from kdfast.distill import parallel
from kdfast.distill.arguments import FitOptions
from kdfast.distill.checkpoint import Best, Checkpointer, monitored
from kdfast.distill.evaluation import evaluate, peak_memory
from kdfast.distill.fields import samples, split, to_device
from kdfast.distill.freezing import training
from kdfast.distill.identity import Identity, SupportsIdentity
from kdfast.distill.log import Log, plot_curves
from kdfast.distill.optimizer import Schedule, constant
from kdfast.distill.state import Position, Record, TrainState
from kdfast.distill.update import SupportsUpdate, Update

__all__ = ["Fit", "SupportsFit"]

CURVES = "curves.png"


class SupportsFit(SupportsUpdate, SupportsIdentity, Protocol):
    """The part of ``Distiller`` that a run uses. The run sets ``epoch`` and ``progress``, which every ``Step`` has."""

    schedule: Schedule
    folder: Path | None
    epoch: int
    progress: float


class Fit:
    """A run of training: one call of ``Distiller.fit``.

    Args:
        distiller: a ``Distiller``.
        loader: the batches to train on.
        eval_loader: the batches to evaluate on, or None.
        options: the other arguments of ``Distiller.fit``.

    Raises:
        ValueError: options that do not fit, an empty loader, or a checkpoint of another run.
    """

    def __init__(
        self, distiller: SupportsFit, loader: Iterable[Any], eval_loader: Iterable[Any] | None, options: FitOptions
    ) -> None:
        options.check(eval_loader is not None)
        self.distiller, self.eval_loader, self.options = distiller, eval_loader, options
        self.position = Position(loader)
        if distiller.folder is not None:
            self.position.require_exact()
        self.steps = _steps(loader, distiller)
        folder = distiller.folder if parallel.is_first() else None
        self.best = Best(parallel.unwrap(distiller.student), options.monitor, options.patience, distiller.folder)
        self.state = TrainState()
        # Before the schedule is made, which changes the learning rates.
        described = distiller.folder is not None and parallel.is_first()
        identity = Identity(distiller, loader, eval_loader, options) if described else None
        self.update = Update(distiller, distiller.schedule(distiller.optimizer, self.steps or 1, options.epochs))
        self._check_plateau()
        self.checkpointer = Checkpointer(
            distiller.folder,
            distiller.student,
            self.position,
            identity=identity,
            epochs=options.epochs,
            train_state=self.state,
            objective=distiller.objective,
            optimizer=distiller.optimizer,
            scheduler=self.update.scheduler,
            scaler=self.update.scaler,
            best=self.best,
        )
        if options.resume:
            self.checkpointer.resume()
        self.log = Log(folder, self.state.step)

    def run(self) -> list[Record]:
        """Train to the end. Returns a record per epoch, those of a resumed run included."""
        d, state = self.distiller, self.state
        for module in (d.student, d.objective):
            if isinstance(module, nn.Module):
                parallel.broadcast_module(module)
        try:
            with training(d.student, d.frozen_norms), self._bar() as bar:
                while state.epoch < self.options.epochs and not state.stopped:
                    self._epoch(bar)
        finally:
            self.log.close()
            d.epoch, d.progress = 0, 0.0
        self.best.restore()
        if d.folder is not None and parallel.is_first() and find_spec("matplotlib") is not None:
            plot_curves(state.history, d.folder / CURVES, sorted({self.options.monitor.removeprefix("-"), "agreement"}))
        return state.history

    def _epoch(self, bar: Any) -> None:
        d, state = self.distiller, self.state
        d.epoch = state.epoch
        batches = self.position.batches(state.epoch)
        began = time.perf_counter() - state.seconds
        while group := list(islice(batches, d.accumulate)):
            share = min(1.0, state.updates / self.steps) if self.steps else 0.0
            d.progress = (state.epoch + share) / self.options.epochs
            self._train_step(group)
            state.seconds = time.perf_counter() - began
            self._log_and_save()
            bar.set_postfix(epoch=state.epoch + 1, loss=f"{state.last_loss:.4g}", refresh=False)
            bar.update()
        record = self._epoch_record()
        state.end_epoch(record)
        self.position.end_epoch()
        self.log.write(record)
        if self.options.on_epoch is not None:
            self.options.on_epoch(record)
        state.stopped = self.best.out_of_patience
        self.checkpointer.save()

    def _train_step(self, group: list[Any]) -> None:
        d, state = self.distiller, self.state
        group = [to_device(batch, d.device) for batch in group]
        try:
            loss = self.update(group)
        except FloatingPointError as error:
            place = f"epoch {state.epoch + 1}, step {state.step + 1}"
            raise FloatingPointError(f"{place}: {error}; {self.checkpointer.describe()}") from None
        self.position.consume(len(group))
        state.count(loss, sum(samples(d.fields.arguments(split(batch)[0])) for batch in group))

    def _log_and_save(self) -> None:
        """Write a line of the log and a checkpoint, if they are due."""
        state, every = self.state, self.options.checkpoint_every
        if state.step % self.options.log_every == 0:
            line = {"step": state.step, "epoch": state.epoch + 1, "loss": state.last_loss, "lr": self._rate()}
            self.log.write(line)
        # After the last step of an epoch there is a checkpoint anyway, once it is evaluated.
        if every is not None and state.step % every == 0 and state.updates != self.steps:
            self.checkpointer.save()

    def _epoch_record(self) -> Record:
        """The record of the epoch that ends, with the evaluation if one is due."""
        d, state, options = self.distiller, self.state, self.options
        record: Record = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "loss": state.loss / state.updates,
            "lr": self._rate(),
            "seconds": state.seconds,
            "samples_per_second": state.samples * parallel.world_size() / state.seconds,
            "parameters": sum(x.numel() for x in d.student.parameters()),
            "peak_memory": peak_memory(d.device),
        }
        if self.eval_loader is not None and (state.epoch + 1) % options.eval_every == 0:
            parallel.broadcast_module(d.student, buffers_only=True)
            record = parallel.broadcast_object(record | evaluate(d, self.eval_loader, options.metrics))
            self._watch(record)
        elif options.monitor == "loss":
            self._watch(record)
        return record

    def _check_plateau(self) -> None:
        """Raise ``ValueError`` if ``ReduceLROnPlateau`` would never get a number."""
        plateau = isinstance(self.update.scheduler, ReduceLROnPlateau)
        if plateau and self.eval_loader is None and self.options.monitor != "loss":
            raise ValueError('ReduceLROnPlateau needs an eval_loader, or monitor="loss", the loss of training')

    def _watch(self, record: Record) -> None:
        self.best.offer(record)
        if isinstance(self.update.scheduler, ReduceLROnPlateau):
            self.update.scheduler.step(monitored(record, self.options.monitor))

    def _rate(self) -> float:
        return float(self.distiller.optimizer.param_groups[0]["lr"])

    def _bar(self) -> Any:
        total = self.steps and self.steps * self.options.epochs
        shown = self.options.progress and parallel.is_first()
        # disable=None shows the bar only if standard error is a terminal.
        return tqdm(total=total, initial=self.state.step, unit="step", disable=None if shown else True)


def _steps(loader: Iterable[Any], distiller: SupportsFit) -> int | None:
    """Optimiser steps of an epoch; None if the loader has no length.

    Raises:
        ValueError: the loader is empty, or has no length and the schedule needs one.
    """
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        if distiller.schedule is not constant:
            raise ValueError('a loader without a length goes with schedule="constant" only') from None
        return None
    if not batches:
        raise ValueError("the loader is empty: it has no batch")
    return -(-batches // distiller.accumulate)
