"""One optimiser step over several batches, with the gradient of one batch that has all their rows."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kdfast.distill import parallel
from kdfast.distill.counting import Counting, rows_shape
from kdfast.distill.fields import Fields
from kdfast.distill.objective import FloorWatch
from kdfast.distill.step import Step, SupportsForward
from kdfast.loss.data_parallel import global_items

__all__ = ["SupportsUpdate", "Update"]


class SupportsUpdate(SupportsForward, Protocol):
    """The part of ``Distiller`` that an optimiser step uses."""

    fields: Fields
    optimizer: Optimizer
    amp: torch.dtype | None
    clip_norm: float | None
    watch: FloorWatch

    @property
    def device(self) -> torch.device | None:
        """The student's device."""
        ...

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        ...

    def loss(self, step: Step) -> Tensor:
        """The objective of a step."""
        ...


class Update:
    """Takes optimiser steps: ``loss = update(batches)``.

    The loss is checked before the weights change, so a loss that is not finite leaves them as they are. Gradients from
    before, of an interrupted step or of another training loop, are discarded.

    Args:
        distiller: a ``Distiller``.
        scheduler: a scheduler of its optimizer, which moves at every step unless it is ``ReduceLROnPlateau``.
    """

    def __init__(self, distiller: SupportsUpdate, scheduler: Any) -> None:
        self.distiller, self.scheduler = distiller, scheduler
        device = distiller.device or torch.device("cpu")
        self.scaler = torch.amp.GradScaler(device.type, enabled=distiller.amp == torch.float16)

    def __call__(self, batches: list[Any]) -> float:
        """Take one step on several batches, as ``to_device`` makes them.

        Returns:
            The mean loss over the rows that count, of all processes.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        d = self.distiller
        d.optimizer.zero_grad()
        step = d.forward(batches[0])
        shares = self._shares(batches, step)
        total = torch.zeros((), device=d.device)
        for number, batch in enumerate(batches):
            loss = d.loss(step if number == 0 else d.forward(batch))
            loss = loss if shares is None else loss * shares[number].to(loss.dtype)
            total = total + loss.detach()
            with self._gradient_sync(number == len(batches) - 1):
                torch.autograd.backward(self.scaler.scale(loss))
        value = self._mean(total)
        d.watch.look()
        if not math.isfinite(value):
            d.optimizer.zero_grad()
            raise FloatingPointError(f"the loss is {value}")
        self._average_gradients()
        self._optimizer_step()
        return value

    def _shares(self, batches: list[Any], step: Step) -> Tensor | None:
        """Each batch's share of the rows that count in all processes; None if a single batch has them all."""
        d = self.distiller
        if len(batches) == 1 and parallel.world_size() == 1:
            return None
        counting, per_token = Counting.of(d.objective), len(rows_shape(step)) > 1
        rows = [counting.rows(batch, d.fields, per_token).to(d.device) for batch in batches]
        items = global_items(*(x.long() for x in rows), ignore_index=0).double()
        return torch.stack([x.sum() for x in rows]) / items.clamp(min=torch.finfo(torch.double).tiny)

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """DDP reduces gradients in the last backward pass of a step only."""
        student = self.distiller.student
        return student.no_sync() if isinstance(student, DistributedDataParallel) and not last else nullcontext()

    def _mean(self, loss: Tensor) -> float:
        if parallel.world_size() > 1:
            dist.all_reduce(loss)
        return float(loss) / parallel.world_size()

    def _average_gradients(self) -> None:
        d = self.distiller
        if parallel.world_size() == 1:
            return
        done = {id(x) for x in d.student.parameters()} if parallel.reduces_itself(d.student) else set()
        parallel.average_gradients([x for x in d.parameters if id(x) not in done])

    def _optimizer_step(self) -> None:
        d = self.distiller
        if d.clip_norm is not None:
            self.scaler.unscale_(d.optimizer)
            nn.utils.clip_grad_norm_(d.parameters, d.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(d.optimizer)
        self.scaler.update()
        d.optimizer.zero_grad()
        taken = self.scaler.get_scale() >= scale  # else the scaler has skipped the step
        if taken and not isinstance(self.scheduler, ReduceLROnPlateau):  # that one moves at evaluations
            self.scheduler.step()
