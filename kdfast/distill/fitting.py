"""A run of training: epochs, evaluation, early stopping, and going on where one was stopped."""

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
from kdfast.distill.arguments import Plan
from kdfast.distill.checkpoint import Best, Saving, monitored
from kdfast.distill.evaluation import evaluate, peak_memory
from kdfast.distill.fields import samples, split, to_device
from kdfast.distill.freezing import training
from kdfast.distill.log import Log, plot_curves
from kdfast.distill.optimizer import Schedule, constant
from kdfast.distill.state import Position, Record, Tally
from kdfast.distill.update import SupportsUpdate, Update

__all__ = ["Fit", "SupportsFit"]

CURVES = "curves.png"


class SupportsFit(SupportsUpdate, Protocol):
    """What a run takes, as ``Distiller`` has it, and where it leaves how far it is."""

    schedule: Schedule
    accumulate: int
    folder: Path | None
    still: list[nn.Module]
    epoch: int
    progress: float


class Fit:
    """One call of ``Distiller.fit``."""

    def __init__(
        self, distiller: SupportsFit, loader: Iterable[Any], eval_loader: Iterable[Any] | None, plan: Plan
    ) -> None:
        plan.check(eval_loader is not None)
        self.distiller, self.eval_loader, self.plan = distiller, eval_loader, plan
        self.position = Position(loader)
        if distiller.folder is not None:
            self.position.require_exact()
        self.steps = _steps(loader, distiller)
        folder = distiller.folder if parallel.is_first() else None
        self.best = Best(parallel.unwrap(distiller.student), plan.monitor, plan.patience, distiller.folder)
        self.tally = Tally()
        self.update = Update(distiller, distiller.schedule(distiller.optimizer, self.steps or 1, plan.epochs))
        self._check_plateau()
        self.saving = Saving(
            distiller.folder,
            distiller.student,
            self.position,
            objective=distiller.objective,
            optimizer=distiller.optimizer,
            scheduler=self.update.scheduler,
            scaler=self.update.scaler,
            best=self.best,
            tally=self.tally,
        )
        if plan.resume:
            self.saving.go_on()
        self.log = Log(folder, self.tally.step)

    def run(self) -> list[Record]:
        """Train to the end; returns a record per epoch."""
        d, tally = self.distiller, self.tally
        for module in (d.student, d.objective):
            if isinstance(module, nn.Module):
                parallel.broadcast_module(module)
        try:
            with training(d.student, d.still), self._bar() as bar:
                while tally.epoch < self.plan.epochs and not tally.stopped:
                    self._epoch(bar)
        finally:
            self.log.close()
            d.epoch, d.progress = 0, 0.0
        self.best.restore()
        if d.folder is not None and parallel.is_first() and find_spec("matplotlib") is not None:
            plot_curves(tally.history, d.folder / CURVES, sorted({self.plan.monitor.removeprefix("-"), "agreement"}))
        return tally.history

    def _epoch(self, bar: Any) -> None:
        d, tally = self.distiller, self.tally
        d.epoch = tally.epoch
        batches = self.position.batches(tally.epoch)
        began = time.perf_counter() - tally.seconds
        while group := list(islice(batches, d.accumulate)):
            share = min(1.0, tally.updates / self.steps) if self.steps else 0.0
            d.progress = (tally.epoch + share) / self.plan.epochs
            self._train(group)
            tally.seconds = time.perf_counter() - began
            self._keep()
            bar.set_postfix(epoch=tally.epoch + 1, loss=f"{tally.last_loss:.4g}", refresh=False)
            bar.update()
        record = self._record()
        tally.end_epoch(record)
        self.position.end_epoch()
        self.log.write(record)
        if self.plan.on_epoch is not None:
            self.plan.on_epoch(record)
        tally.stopped = self.best.is_over
        self.saving.save()

    def _train(self, group: list[Any]) -> None:
        d, tally = self.distiller, self.tally
        group = [to_device(batch, d.device) for batch in group]
        try:
            loss = self.update(group)
        except FloatingPointError as error:
            place = f"epoch {tally.epoch + 1}, step {tally.step + 1}"
            raise FloatingPointError(f"{place}: {error}; {self.saving.whereabouts()}") from None
        self.position.consume(len(group))
        tally.count(loss, sum(samples(d.fields.arguments(split(batch)[0])) for batch in group))

    def _keep(self) -> None:
        """A line of the log and a checkpoint, if it is time for them."""
        tally, every = self.tally, self.plan.checkpoint_every
        if tally.step % self.plan.log_every == 0:
            line = {"step": tally.step, "epoch": tally.epoch + 1, "loss": tally.last_loss, "lr": self._rate()}
            self.log.write(line)
        # The last step of an epoch has a checkpoint of its own, after the evaluation.
        if every is not None and tally.step % every == 0 and tally.updates != self.steps:
            self.saving.save()

    def _record(self) -> Record:
        """What is known at an epoch's end, the evaluation included if it is time for one."""
        d, tally, plan = self.distiller, self.tally, self.plan
        record: Record = {
            "epoch": tally.epoch + 1,
            "step": tally.step,
            "loss": tally.loss / tally.updates,
            "lr": self._rate(),
            "seconds": tally.seconds,
            "samples_per_second": tally.samples * parallel.world_size() / tally.seconds,
            "parameters": sum(x.numel() for x in d.student.parameters()),
            "peak_memory": peak_memory(d.device),
        }
        if self.eval_loader is not None and (tally.epoch + 1) % plan.eval_every == 0:
            parallel.broadcast_module(d.student, buffers_only=True)
            record = parallel.broadcast_object(record | evaluate(d, self.eval_loader, plan.metrics))
            self._watch(record)
        elif plan.monitor == "loss":
            self._watch(record)
        return record

    def _check_plateau(self) -> None:
        """Raises ``ValueError`` where nothing would ever be measured for the schedule."""
        plateau = isinstance(self.update.scheduler, ReduceLROnPlateau)
        if plateau and self.eval_loader is None and self.plan.monitor != "loss":
            raise ValueError('ReduceLROnPlateau needs an eval_loader, or monitor="loss", the loss of training')

    def _watch(self, record: Record) -> None:
        self.best.offer(record)
        if isinstance(self.update.scheduler, ReduceLROnPlateau):
            self.update.scheduler.step(monitored(record, self.plan.monitor))

    def _rate(self) -> float:
        return float(self.distiller.optimizer.param_groups[0]["lr"])

    def _bar(self) -> Any:
        total = self.steps and self.steps * self.plan.epochs
        shown = self.plan.progress and parallel.is_first()
        # None: only where standard error is a terminal.
        return tqdm(total=total, initial=self.tally.step, unit="step", disable=None if shown else True)


def _steps(loader: Iterable[Any], distiller: SupportsFit) -> int | None:
    """Of an epoch; None where the loader has no length. Raises ``ValueError`` where it is empty, or must have one."""
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        if distiller.schedule is not constant:
            raise ValueError('a loader without a length goes with schedule="constant" only') from None
        return None
    if not batches:
        raise ValueError("the loader is empty: it has no batch")
    return -(-batches // distiller.accumulate)
