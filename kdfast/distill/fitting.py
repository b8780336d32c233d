"""A run of training: epochs, evaluation, early stopping, checkpoints, and resuming from them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kdfast._interrupts import Interrupts
from kdfast._progress import Progress
from kdfast.distill import parallel
from kdfast.distill.arguments import FitOptions
from kdfast.distill.checkpoint import Best, Checkpointer, monitored
from kdfast.distill.evaluation import evaluate, peak_memory
from kdfast.distill.fields import samples, split, to_device
from kdfast.distill.freezing import training
from kdfast.distill.identity import Identity, SupportsIdentity, tell
from kdfast.distill.log import Log, plot_curves
from kdfast.distill.objective import FloorWatch
from kdfast.distill.optimizer import Schedule, constant
from kdfast.distill.position import Position
from kdfast.distill.state import Record, TrainState
from kdfast.distill.update import SupportsUpdate, Update

__all__ = ["Fit", "SupportsFit"]

CURVES = "curves.png"
UNEQUAL = "each must have as many (DistributedSampler, or ElasticSampler with drop_last, deals them out evenly)"


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
        self.position = Position(loader, self._samples)
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
        distiller.watch = FloorWatch(due=parallel.is_first())
        self.interrupts = Interrupts(None if distiller.folder is None else str(self.checkpointer.path))

    def run(self) -> list[Record]:
        """Train to the end. Returns a record per epoch, those of a resumed run included."""
        d, state = self.distiller, self.state
        for module in (d.student, d.objective):
            if isinstance(module, nn.Module):
                parallel.broadcast_module(module)
        try:
            with training(d.student, d.frozen_norms), self.interrupts, self._bar() as bar:
                while state.epoch < self.options.epochs and not state.stopped:
                    self._epoch(bar)
                    self._stop_if_asked(parallel.maximum(self.interrupts.signal), saved=True)
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
        while True:
            group = self._next_group(batches)
            signal = self._agree(len(group))
            if not group:
                break
            share = min(1.0, state.updates / self.steps) if self.steps else 0.0
            d.progress = (state.epoch + share) / self.options.epochs
            self._train_step(group)
            state.seconds = time.perf_counter() - began
            self._log_and_save()
            bar.advance(note=f"epoch {state.epoch + 1}, loss {state.last_loss:.4g}")
            self._stop_if_asked(signal if parallel.world_size() > 1 else self.interrupts.signal)
        record = self._epoch_record()
        state.end_epoch(record)
        self.position.end_epoch()
        self.log.write(record)
        if self.options.on_epoch is not None:
            self.options.on_epoch(record)
        state.stopped = self.best.out_of_patience
        self.checkpointer.save()

    def _next_group(self, batches: Iterator[Any]) -> list[Any]:
        """The batches of the next optimiser step; none at the epoch's end."""
        try:
            return list(islice(batches, self.distiller.accumulate))
        except Exception:
            # An interrupt from a terminal also ends the loader's workers, and then it fails here.
            if parallel.world_size() == 1:
                self._stop_if_asked(self.interrupts.signal)
            parallel.maximum(-1, 1, 0)  # the others are waiting in _agree
            raise

    def _agree(self, batches: int) -> int:
        """Compare the processes' numbers of batches. Returns the signal that one of them has got, or 0.

        Raises:
            ValueError: in all of them, where they differ.
        """
        most, fewest, signal = parallel.maximum(batches, -batches, self.interrupts.signal)
        if most != -fewest:
            place = f"epoch {self.state.epoch + 1}, step {self.state.step + 1}"
            what = f"some processes have {most} batches and some {-fewest}: {UNEQUAL}"
            what = "another process could not read its next batch" if fewest > 0 else what
            raise ValueError(f"{place}: {what}; {self.checkpointer.describe()}")
        return signal

    def _stop_if_asked(self, signal: int, *, saved: bool = False) -> None:
        """Where a signal has arrived, write a checkpoint if need be, and let it take effect."""
        if not signal:
            return
        if not saved:
            self.checkpointer.save()
        tell(f"stopped: {self.checkpointer.describe()}, from which the same call resumes")
        self.interrupts.deliver(signal)

    def _train_step(self, group: list[Any]) -> None:
        d, state = self.distiller, self.state
        d.watch.due |= (state.step + 1) % self.options.log_every == 0 and parallel.is_first()
        group = [to_device(batch, d.device) for batch in group]
        try:
            loss = self.update(group)
        except FloatingPointError as error:
            place = f"epoch {state.epoch + 1}, step {state.step + 1}"
            raise FloatingPointError(f"{place}: {error}; {self.checkpointer.describe()}") from None
        self.position.consume(group)
        state.count(loss, sum(map(self._samples, group)))

    def _samples(self, batch: Any) -> int:
        """The number of samples in a batch of the loader."""
        return samples(self.distiller.fields.arguments(split(to_device(batch, None))[0]))

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

    def _bar(self) -> Progress:
        total = self.steps and self.steps * self.options.epochs
        shown = self.options.progress and parallel.is_first()
        return Progress("fit", total=total, shown=shown, initial=self.state.step)


def _steps(loader: Iterable[Any], distiller: SupportsFit) -> int | None:
    """Optimiser steps of an epoch; None if the loader has no length.

    Raises:
        ValueError: the loader is empty, processes have loaders of different lengths, or it has no length and the
            schedule needs one.
    """
    try:
        batches: int | None = len(loader)  # type: ignore[arg-type]
    except TypeError:
        batches = None
    numbers = parallel.all_gather_object(batches)
    if len(set(numbers)) > 1:
        listed = ", ".join(f"{number} in process {rank}" for rank, number in enumerate(numbers))
        raise ValueError(f"the processes have different numbers of batches, {listed}: {UNEQUAL}")
    if batches is None:
        if distiller.schedule is not constant:
            raise ValueError('a loader without a length goes with schedule="constant" only')
        return None
    if not batches:
        raise ValueError("the loader is empty: it has no batch")
    return -(-batches // distiller.accumulate)
