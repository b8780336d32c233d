"""Detection: a small head on a grid of anchors learns classes and boxes from labels and a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast import Distiller
from kdfast.distill import Step
from kdfast.recipes import Detections, detection_kd

SIZE, CELL, CLASSES = 16, 4, 3  # nothing, square, cross


class Detector(nn.Module):
    """An anchor for each of 4 x 4 cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, CLASSES + 4, 3, 1, 1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Detections:
        anchors = self.body(images).flatten(2).mT
        return Detections(anchors[..., :CLASSES], anchors[..., CLASSES:])


def scenes(count: int) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Batches of (images, (classes, boxes)): one object each; a box is centre and size, relative to its cell."""
    centre, half = torch.randint(3, SIZE - 3, (count, 2)), torch.randint(2, 4, (count, 1))
    kind = torch.randint(1, CLASSES, (count,))
    y, x = ((torch.arange(SIZE) - centre[:, i, None]).abs() for i in (0, 1))
    y, x, h = y[:, :, None], x[:, None, :], half[:, :, None]
    shape = torch.where(kind[:, None, None] == 1, torch.maximum(y, x) <= h, (torch.minimum(y, x) == 0) & (y + x <= h))
    images = shape[:, None] + 0.3 * torch.randn(count, 1, SIZE, SIZE)
    cell = (centre // CELL)[:, 0] * (SIZE // CELL) + (centre // CELL)[:, 1]
    classes = torch.zeros(count, 16, dtype=torch.long).scatter_(1, cell[:, None], kind[:, None])
    box = torch.cat([(centre % CELL) / CELL, half.expand(-1, 2) / CELL], 1)
    boxes = torch.zeros(count, 16, 4).scatter_(1, cell[:, None, None].expand(-1, 1, 4), box[:, None])
    return [(i, (c, b)) for i, c, b in zip(images.split(32), classes.split(32), boxes.split(32), strict=True)]


def supervised(step: Step) -> Tensor:
    (classes, boxes), found = step.batch[1], step.student
    distance = nn.functional.smooth_l1_loss(found.boxes[classes > 0], boxes[classes > 0])
    return nn.functional.cross_entropy(found.logits.flatten(0, 1), classes.flatten()) + 4 * distance


def distilled(step: Step) -> Tensor:
    return detection_kd(
        step.student, step.teacher, *step.batch[1], temperature=2.0, ce_weight=1.0, foreground_weight=4.0
    )


@torch.no_grad()
def score(model: nn.Module, batches: list[tuple[Tensor, tuple[Tensor, Tensor]]]) -> tuple[float, float]:
    """The share of objects whose cell has the right class, and their boxes' mean error in pixels."""
    (images, (classes, boxes)), objects = batches[0], batches[0][1][0] > 0
    found = model.eval()(images)
    right = found.logits.argmax(-1)[objects] == classes[objects]
    return float(right.float().mean()), float((found.boxes - boxes)[objects].abs().mean() * CELL)


def main() -> None:
    torch.manual_seed(0)
    train, test = scenes(1024), scenes(32)
    teacher, student = Detector(24), Detector(6)
    labels = {"labels": lambda batch: batch[1][0], "lr": 5e-3}
    Distiller(teacher, objective=supervised, **labels).fit(train, epochs=8, progress=False)
    Distiller(student, teacher, objective=distilled, **labels).fit(train, epochs=8, progress=False)
    for name, model in (("teacher", teacher), ("student", student)):
        print("{}: {:.0%} of objects found, boxes off by {:.2f} pixels".format(name, *score(model, test)))


if __name__ == "__main__":
    main()
