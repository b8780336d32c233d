"""What may go wrong with an image between training and use, and with a label before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kdfast.demo.data import CLASSES
from kdfast.experiments.mnist import SIDE

__all__ = ["CORRUPTIONS", "blur", "flip_labels", "noise", "occlude"]

SIGMA = 0.3  # of the noise; pixels are in 0 ... 1
PATCH = 3  # the occluded square's side, pixels


def noise(images: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise on every pixel, cut off at 0 and 1."""
    return (images + SIGMA * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, generator: Generator) -> Tensor:
    """The binomial filter (1 2 1) / 4 in both directions. Nothing is drawn from ``generator``."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(taps, taps).view(1, 1, 3, 3)
    return F.conv2d(images.view(-1, 1, SIDE, SIDE), kernel, padding=1).flatten(1)


def occlude(images: Tensor, generator: Generator) -> Tensor:
    """A black square of ``PATCH`` x ``PATCH`` pixels anywhere inside each image."""
    rows, columns = torch.randint(SIDE - PATCH + 1, (2, len(images), 1), generator=generator)
    place = torch.arange(SIDE)
    in_rows, in_columns = ((place >= start) & (place < start + PATCH) for start in (rows, columns))
    hidden = in_rows[:, :, None] & in_columns[:, None, :]
    return images.masked_fill(hidden.flatten(1), 0.0)


CORRUPTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"noise": noise, "blur": blur, "occlusion": occlude}


def flip_labels(labels: Tensor, share: float, generator: Generator) -> Tensor:
    """A copy in which ``share`` of the labels, drawn at random, are another class, each of the others as likely.

    Raises:
        ValueError: ``share`` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, CLASSES, (len(wrong),), generator=generator)
    flipped = labels.clone()
    flipped[wrong] = (labels[wrong] + shift) % CLASSES
    return flipped
