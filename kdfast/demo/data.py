"""scikit-learn's digits: 1797 real handwritten digits of 8 x 8 pixels, inside its wheel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["CLASSES", "Split", "load", "pick_labelled"]

CLASSES = 10
TEST, VALIDATION = 597, 300  # leaves 1200 images to train on, 900 while choosing settings
SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        pixels: (rows, 64) uint8 in 0 ... 16, on the CPU: the images' keys in the cache.
        images: (rows, 64) float32 in 0 ... 1, on the device.
        labels: (rows,) int64, on the device.
    """

    pixels: Tensor
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


def load(device: str = "cpu", *, validation: bool = False) -> tuple[Split, Split]:
    """Load the training and the test split, stratified by digit and the same in every run.

    With ``validation`` the test split is left alone, and both come from the training split.
    """
    pixels, labels = load_digits(return_X_y=True)
    train, test = _divide(pixels, labels, TEST)
    if validation:
        train, test = _divide(*train, VALIDATION)
    return _split(*train, device), _split(*test, device)


def pick_labelled(labels: Tensor, count: int, seed: int) -> Tensor:
    """Draw the rows that keep their labels, with the same number of each digit.

    Args:
        labels: (rows,) class indices.
        count: how many rows to draw, a multiple of 10.
        seed: of the draw.

    Returns:
        (count,) indices of rows.

    Raises:
        ValueError: ``count`` is not a multiple of 10.
    """
    if count % CLASSES:
        raise ValueError(f"labelled must be a multiple of {CLASSES}, got {count}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    return torch.cat([order[shuffled == digit][: count // CLASSES] for digit in range(CLASSES)]).to(labels.device)


Arrays = tuple[NDArray[Any], NDArray[Any]]


def _divide(pixels: NDArray[Any], labels: NDArray[Any], held_out: int) -> tuple[Arrays, Arrays]:
    x, x_out, y, y_out = train_test_split(pixels, labels, test_size=held_out, stratify=labels, random_state=SPLIT_SEED)
    return (x, y), (x_out, y_out)


def _split(pixels: NDArray[Any], labels: NDArray[Any], device: str) -> Split:
    raw = torch.from_numpy(pixels.astype(np.uint8))
    return Split(raw, (raw.float() / 16).to(device), torch.from_numpy(labels).long().to(device))
