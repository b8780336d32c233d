"""Regression: the teacher says where it is unsure, and the student of 30 labels learns that from unlabelled inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast import Distiller
from kdfast.distill import Step
from kdfast.recipes import gaussian_kd


def curve(count: int) -> tuple[Tensor, Tensor]:
    """A sine whose noise grows from left to right."""
    x = 6 * torch.rand(count, 1)
    return x, x.sin() + 0.02 * (1 + x**2) * torch.randn(count, 1)


def network(width: int) -> nn.Module:
    """(N, 2): mean and log-variance."""
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


def likelihood(output: Tensor, targets: Tensor) -> Tensor:
    mean, log_variance = output.split(1, -1)
    return nn.functional.gaussian_nll_loss(mean, targets, log_variance.exp())


def supervised(step: Step) -> Tensor:
    return likelihood(step.student, step.batch[1])


def distilled(step: Step) -> Tensor:
    return gaussian_kd(*step.student.split(1, -1), *step.teacher.split(1, -1))


def main() -> None:
    torch.manual_seed(0)
    (x, y), test = curve(2048), curve(1024)
    labelled = list(zip(x.split(64), y.split(64), strict=True))
    few = [(x[:30], y[:30])] * 32
    teacher, alone, student = network(48), network(12), network(12)
    Distiller(teacher, objective=supervised, lr=5e-3).fit(labelled, epochs=30, progress=False)
    Distiller(alone, objective=supervised, lr=5e-3).fit(few, epochs=30, progress=False)
    Distiller(student, teacher, objective=distilled, lr=5e-3).fit(x.split(64), epochs=30, progress=False)
    with torch.no_grad():
        scores = [float(likelihood(model(test[0]), test[1])) for model in (teacher, alone, student)]
    print("negative log-likelihood: teacher {:.3f}, 30 labels {:.3f}, distilled {:.3f}".format(*scores))


if __name__ == "__main__":
    main()
