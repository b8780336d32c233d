"""What was done to a sample before the teacher saw it, so that a student's loader can do the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["VIEW_BYTES", "View", "pack_views", "unpack_views"]

FRACTIONS = 65535  # a u16 holds a fraction as this many parts
CROPPED, FLIPPED = 1, 2  # bits of ``flags``
PACKED = np.dtype([("crop", "<u2", (4,)), ("seed", "<u4"), ("flags", "u1")])
VIEW_BYTES = PACKED.itemsize


@dataclass(frozen=True)
class View:
    """One augmentation of a sample: a crop, a mirror image, and a seed for whatever else is random.

    Args:
        crop: (top, left, height, width) as fractions of the image, 0 ... 1, or None. Stored in parts of 65535: build
            the view first and crop by what it then says, so that teacher and student see the same pixels.
        flip: whether left and right are exchanged, after the crop.
        seed: 0 ... 2**32 - 1.

    Raises:
        ValueError: a fraction or a seed out of range.
    """

    crop: tuple[float, float, float, float] | None = None
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"a view's seed must lie in [0, 2**32), got {self.seed}")
        if self.crop is None:
            return
        if len(self.crop) != 4 or not all(0 <= part <= 1 for part in self.crop):
            raise ValueError(f"a view's crop is (top, left, height, width) as fractions 0 ... 1, got {self.crop}")
        top, left, height, width = (round(part * FRACTIONS) / FRACTIONS for part in self.crop)
        object.__setattr__(self, "crop", (top, left, height, width))


def pack_views(views: Sequence[View]) -> NDArray[np.uint8]:
    """(rows, 13): each view as the shard stores it."""
    packed = np.zeros(len(views), PACKED)
    for row, view in zip(packed, views, strict=True):
        if view.crop is not None:
            row["crop"] = [round(part * FRACTIONS) for part in view.crop]
        row["seed"] = view.seed
        row["flags"] = CROPPED * (view.crop is not None) + FLIPPED * bool(view.flip)
    return packed.view(np.uint8).reshape(-1, VIEW_BYTES)


def unpack_views(packed: NDArray[np.uint8]) -> list[View]:
    """The views of ``packed``, (rows, 13).

    Raises:
        ValueError: a row is not what ``pack_views`` writes.
    """
    rows: NDArray[Any] = np.ascontiguousarray(packed).reshape(-1).view(PACKED)
    bad = (rows["flags"] > CROPPED + FLIPPED) | ((rows["flags"] & CROPPED == 0) & rows["crop"].any(1))
    for row in np.flatnonzero(bad)[:1]:
        raise ValueError(f"the view of row {row} is not one: {packed[row].tobytes().hex()}")
    return [
        View(
            tuple(part / FRACTIONS for part in crop) if flags & CROPPED else None,
            bool(flags & FLIPPED),
            seed,
        )
        for crop, seed, flags in zip(*(rows[name].tolist() for name in PACKED.names or ()), strict=True)
    ]
