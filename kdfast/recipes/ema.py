"""Self-distillation: the teacher is a moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from kdfast.distill.distiller import Distiller
from kdfast.distill.objective import KD
from kdfast.distill.step import Objective, Step

__all__ = ["EMATeacher", "self_distillation"]

Optimizers = Callable[[Iterable[nn.Parameter]], Optimizer]


class EMATeacher(AveragedModel):
    """A model whose weights are an exponential moving average of a student's (Mean Teacher, Tarvainen & Valpola 2017)::

        teacher = a teacher + (1 - a) student,   a = min(decay, 1 - 1 / (n + 1)) at the n-th update, from 0

    Early averages are plain means of the student's weights so far, so that its random start is soon forgotten. Buffers,
    such as batch norm's statistics, are copied from the student. ``state_dict`` includes the number of updates.

    Args:
        student: the model to average; ``update_parameters(student)`` makes one update.
        decay: in [0, 1).
        warm_up: False has a = decay from the first update.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    def __init__(self, student: nn.Module, decay: float = 0.999, *, warm_up: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")

        def average(teacher: Tensor, student: Tensor, updates: Tensor | int) -> Tensor:
            now = torch.as_tensor(updates, dtype=torch.float64)
            a = (1.0 - 1.0 / (now + 1.0)).clamp(max=decay) if warm_up else torch.full_like(now, decay)
            return torch.lerp(teacher, student, (1.0 - a).to(teacher))

        super().__init__(student, avg_fn=average)
        self.requires_grad_(False)
        # AveragedModel's first update copies, which is a = 0 of the warm-up. Without one the average has begun already.
        self.n_averaged.fill_(0 if warm_up else 1)

    def following(self, student: nn.Module, make: Optimizers) -> Optimizers:
        """A function like ``make``, whose optimizer updates this average after each of its steps.

        With accumulation, or where a gradient scaler skips a step, that is not the same as after each batch.
        """

        def make_one(parameters: Iterable[nn.Parameter]) -> Optimizer:
            optimizer = make(parameters)
            optimizer.register_step_post_hook(lambda *_: self.update_parameters(student))
            return optimizer

        return make_one


class _WithTeacher(nn.Module):
    """An objective whose checkpoints include a teacher."""

    def __init__(self, objective: Objective, teacher: nn.Module) -> None:
        super().__init__()
        self.objective, self.teacher = objective, teacher
        self.options = getattr(objective, "options", {})

    def forward(self, step: Step) -> Tensor:
        return self.objective(step)


def self_distillation(
    student: nn.Module,
    *,
    decay: float = 0.999,
    warm_up: bool = True,
    objective: Objective | None = None,
    optimizer: Optimizers | None = None,
    lr: float = 1e-3,
    **options: Any,
) -> Distiller:
    """Make a ``Distiller`` whose teacher is an ``EMATeacher`` of the student::

        self_distillation(student, objective=KD(temperature=1.0, kd_weight=ramp_up(1.0), ce_weight=1.0)).fit(...)

    The average is updated after every optimiser step, and saved in the checkpoints.

    Args:
        student: the model to train.
        decay, warm_up: ``EMATeacher``'s.
        objective: ``KD()`` if None.
        optimizer: a function from parameters to an optimizer; AdamW with ``lr`` if None.
        lr: the learning rate of AdamW.
        options: ``Distiller``'s others.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
        TypeError: ``optimizer`` is an optimizer, and not a function that makes one.
    """
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            "self_distillation needs a function that makes an optimizer of the parameters, got an optimizer"
        )
    teacher = EMATeacher(student, decay, warm_up=warm_up)
    make = optimizer or (lambda parameters: AdamW(parameters, lr))
    return Distiller(
        student,
        teacher,
        objective=_WithTeacher(KD() if objective is None else objective, teacher),
        optimizer=teacher.following(student, make),
        **options,
    )
