"""Argument checks that the recipes of one shape or another share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["require_alike", "require_mask"]


def require_alike(frozen: str, /, **tensors: Tensor) -> None:
    """Floating-point tensors of one shape, of which the one named ``frozen``, the teacher's, has no gradient.

    Raises:
        TypeError: one is no floating-point tensor.
        ValueError: shapes differ, or the teacher's requires grad.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"all of these must have one shape, got {shapes}")
    if tensors[frozen].requires_grad:
        raise ValueError(f"{frozen} requires grad, but only the student is trained: compute it under torch.no_grad()")


def require_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """A bool tensor of ``shape``. Raises ``ValueError`` otherwise."""
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"{name} must be a bool tensor of {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}")
