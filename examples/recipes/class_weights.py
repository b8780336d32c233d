"""Weights per class: the terms of a rare class weigh more, so that the student finds it more often."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast import Distiller
from kdfast.objectives import class_weighted_ce

SHARES = torch.tensor([0.60, 0.37, 0.03])  # of the classes
WEIGHTS = 1 / (3 * SHARES)


def points(shares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Clouds that overlap, the rare class between the others."""
    labels = shares.multinomial(count, replacement=True)
    centres = torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 1.0]])
    return centres[labels] + 0.8 * torch.randn(count, 2), labels


def recall(model: nn.Module, inputs: Tensor, labels: Tensor) -> list[float]:
    """The recall of each class."""
    with torch.no_grad():
        found = model.eval()(inputs).argmax(1)
    return [float((found[labels == c] == c).float().mean()) for c in range(3)]


def main() -> None:
    torch.manual_seed(0)
    inputs, labels = points(SHARES, 4096)
    test = points(torch.ones(3), 3000)
    teacher = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    plain, weighted = nn.Linear(2, 3), nn.Linear(2, 3)
    batches = list(zip(inputs.split(64), labels.split(64), strict=True))
    Distiller(teacher, lr=1e-2).fit(batches, epochs=5, progress=False)
    Distiller(plain, teacher, temperature=1.0, kd_weight=1.0, ce_weight=0.0, lr=1e-2).fit(
        batches, epochs=5, progress=False
    )
    Distiller(
        weighted, teacher, objective=lambda step: class_weighted_ce(step.logits, step.teacher, WEIGHTS), lr=1e-2
    ).fit(batches, epochs=5, progress=False)
    for name, model in (("plain KD", plain), ("weighted KD", weighted)):
        print("{}: recall {:.2f}, {:.2f}, rare class {:.2f}".format(name, *recall(model, *test)))


if __name__ == "__main__":
    main()
