"""What the losses on features share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_features", "gram", "mean_of", "unit", "widened"]


def check_features(student: object, teacher: object, *, dims: tuple[int, ...] | None = None) -> None:
    """Floating-point tensors of one batch on one device, of at least two or of ``dims`` dimensions; a fixed teacher.

    Raises:
        TypeError, ValueError: anything else, naming it.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided:
            got = f"{x.dtype} {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor of features, got {got}")
        if x.dim() < 2 or (dims is not None and x.dim() not in dims):
            wanted = "at least 2" if dims is None else " or ".join(str(d) for d in dims)
            raise ValueError(f"{name} must have {wanted} dimensions, the first of samples, got {tuple(x.shape)}")
    assert isinstance(student, Tensor)
    assert isinstance(teacher, Tensor)
    if len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} samples, teacher {len(teacher)}")
    if student.device != teacher.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}")
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher requires grad, but only the student is trained: compute it under torch.no_grad()")


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 at least: a sum of squares leaves the range of narrow types."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Vectors along the last dimension over their length; a zero vector stays zero and gets a zero gradient.

    ``F.normalize`` divides it by 1e-12, which makes its gradient 1e12 times too large.
    """
    zero = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) == 0.0
    x = torch.where(zero, 1.0, x)  # the length of zeros has no second derivative
    return torch.where(zero, 0.0, x / torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def gram(x: Tensor) -> Tensor:
    """Inner products of (..., N, D) vectors, in their own type: autocast's float16 would overflow."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.mT


def mean_of(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean of ``values`` over those that count; 0, with a graph, if none do."""
    if counted is None:
        return values.sum() / max(values.numel(), 1)
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)
