"""Adapters: a network for upright digits learns rotated ones from a teacher, and trains 8 % of its numbers."""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kdfast import Distiller
from kdfast.recipes import add_lora, merge_lora


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    upright, labels = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits)
    rotated = upright.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
    train, test = slice(0, 1200), slice(1200, None)
    original, teacher = network(64), network(128)
    for model, images in ((original, upright), (teacher, rotated)):
        batches = list(zip(images[train].split(50), labels[train].split(50), strict=True))
        Distiller(model, lr=3e-3).fit(batches, epochs=10, progress=False)

    student = copy.deepcopy(original)
    add_lora(student, rank=2)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in original.parameters())
    Distiller(student, teacher, temperature=2.0, kd_weight=1.0, ce_weight=0.0, lr=1e-2).fit(
        rotated[train].split(50), epochs=20, progress=False
    )
    merged = copy.deepcopy(student)
    merge_lora(merged)
    scores = [accuracy(model, rotated[test], labels[test]) for model in (teacher, original, student, merged)]
    print(
        "rotated digits: teacher {:.3f}, before {:.3f}, with adapters {:.3f}, merged {:.3f}".format(*scores),
        f"({share:.1%} of the numbers trained)",
    )


if __name__ == "__main__":
    main()
