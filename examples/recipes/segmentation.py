"""Segmentation: a student of half the resolution learns a class per pixel from a teacher, without a label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast import Distiller
from kdfast.distill import Step
from kdfast.recipes import segmentation_kd

CLASSES, SIZE, UNLABELLED = 3, 24, 255  # background, disc, frame


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Discs and square frames in noise: (N, 1, 24, 24), and a class per pixel."""
    grid = torch.arange(SIZE) - torch.randint(6, 18, (2, count, 1))
    y, x = grid[0][:, :, None].abs(), grid[1][:, None, :].abs()
    kind = torch.randint(1, CLASSES, (count, 1, 1))
    inside = torch.where(kind == 1, y**2 + x**2 <= 20, torch.maximum(y, x) // 2 == 2)
    labels = torch.where(inside, kind, 0)
    return (inside[:, None] + 0.5 * torch.randn(count, 1, SIZE, SIZE)), labels


def network(width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride, 2),
        nn.ReLU(),
        nn.Conv2d(width, width, 5, 1, 2),
        nn.ReLU(),
        nn.Conv2d(width, 3, 1),
    ).to(memory_format=torch.channels_last)  # its logits are rows without a copy


def supervised(step: Step) -> Tensor:
    size = step.labels.shape[1:]
    logits = nn.functional.interpolate(step.logits, size, mode="bilinear")
    return nn.functional.cross_entropy(logits, step.labels, ignore_index=UNLABELLED)


def distilled(step: Step) -> Tensor:
    return segmentation_kd(step.logits, step.teacher, resize="bilinear", temperature=1.0)


@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    found = nn.functional.interpolate(model.eval()(images), labels.shape[1:], mode="bilinear").argmax(1)
    shares = [((found == c) & (labels == c)).sum() / ((found == c) | (labels == c)).sum() for c in range(CLASSES)]
    return float(sum(shares) / CLASSES)


def main() -> None:
    torch.manual_seed(0)
    (images, labels), test = pictures(256), pictures(64)
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    teacher, alone, student = network(16, 1), network(8, 2), network(8, 2)
    Distiller(teacher, objective=supervised, lr=1e-2).fit(batches, epochs=10, progress=False)
    Distiller(alone, objective=supervised, lr=1e-2).fit([(images[:8], labels[:8])], epochs=320, progress=False)
    Distiller(student, teacher, objective=distilled, lr=1e-2).fit(batches, epochs=10, progress=False)
    scores = [mean_iou(model, *test) for model in (teacher, alone, student)]
    print("mean IoU: teacher {:.3f}, 8 labelled images {:.3f}, distilled without labels {:.3f}".format(*scores))


if __name__ == "__main__":
    main()
