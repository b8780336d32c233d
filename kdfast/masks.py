"""Masks as people have them: bool, or integers of 0 and 1, as tokenizers give an ``attention_mask``.

The dtype alone says what a tensor is, so that nobody has to look at values on a device: a bool or integer tensor is a
mask, a floating-point one holds numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast._checks import can_look, values_are_checked

__all__ = ["as_mask", "check_zeros_and_ones", "is_mask"]

_INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16)


def is_mask(x: Tensor) -> bool:
    """Whether a tensor is a mask by its dtype: bool, or integer."""
    return x.dtype == torch.bool or x.dtype in _INTEGERS


def check_zeros_and_ones(name: str, mask: Tensor, instead: str) -> None:
    """Raise ``ValueError`` for an integer mask with other values than 0 and 1, where they may be looked at.

    Tensors of other dtypes pass. ``instead`` ends the message: what to write for something that is no mask.
    """
    if mask.dtype not in _INTEGERS or not mask.numel() or not (can_look(mask) or values_are_checked()):
        return
    low, high = (int(end) for end in torch.aminmax(mask))
    if low < 0 or high > 1:
        raise ValueError(f"{name} of {mask.dtype} is a mask of 0 and 1, got values from {low} to {high}; {instead}")


def as_mask(name: str, mask: object, shape: Sequence[int]) -> Tensor:
    """``mask`` as a bool tensor: true where it is not 0.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, floating-point numbers, or integers other than 0 and 1 where they may be looked at.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a bool tensor of {tuple(shape)}, got {type(mask).__name__}")
    if mask.shape != tuple(shape) or not is_mask(mask) or mask.layout != torch.strided:
        hint = "" if is_mask(mask) else f": {name} != 0 makes a mask of numbers"
        raise ValueError(f"{name} must be a bool tensor of {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}{hint}")
    check_zeros_and_ones(name, mask, f"{name} != 0 makes a mask of other numbers")
    return mask if mask.dtype == torch.bool else mask != 0
