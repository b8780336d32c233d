"""Where a network looks: maps of its features' energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.masks import as_mask
from kdfast.objectives._vectors import check_features, mean_of, unit, widened

__all__ = ["attention_transfer"]

_POOLS: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
)


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over samples of |a_s / |a_s| - a_t / |a_t||^2, with a map's entries a = sum over channels of x^2.

    Attention transfer (Zagoruyko & Komodakis 2017), in [0, 2] per sample. The authors' code also divides by the number
    of positions: their weight of 1000 is 1000 / (H W) here. Widths may differ. Where sizes do, each axis of the larger
    map is averaged down to the smaller's; the authors pool features before the square, which a caller can do. A map of
    zeros stays zero and gets no gradient.

    Args:
        student, teacher: (N, C, H, W), (N, C, D, H, W), or sequences (N, T, D), whose features come last.
        mask: bool, or integers of 0 and 1, of the maps' shape, (N, T) or (N, H, W): positions that count, for padding.
            Sizes must agree then.

    Raises:
        TypeError, ValueError: other shapes, or a teacher that requires grad.
    """
    check_features(student, teacher, dims=(3, 4, 5))
    if student.dim() != teacher.dim():
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in dimensions")
    channel = -1 if student.dim() == 3 else 1
    if mask is not None:
        for x in (student, teacher):
            mask = as_mask("mask", mask, x.movedim(channel, -1).shape[:-1])
        # Before the square: its gradient would be NaN where a position that does not count is.
        student, teacher = (torch.where(mask.unsqueeze(channel), x, 0.0) for x in (student, teacher))
    a_s, a_t = (widened(x).square().sum(channel) for x in (student, teacher))
    size = [min(sizes) for sizes in zip(a_s.shape[1:], a_t.shape[1:], strict=True)]
    a_s, a_t = (unit(_pooled(a, size).flatten(1)) for a in (a_s, a_t))
    return mean_of((a_s - a_t).square().sum(1), None if mask is None else mask.flatten(1).any(1))


def _pooled(a: Tensor, size: list[int]) -> Tensor:
    return a if list(a.shape[1:]) == size else _POOLS[len(size)](a, size)
