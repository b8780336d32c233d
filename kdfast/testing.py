"""Laws that every kernel keeps, for the tests of this package and of kernels written elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import SoftLabels, kd_loss
from kdfast.divergences import Divergence
from kdfast.loss import reference

__all__ = ["ROUNDING", "assert_close_to_eager", "loss_and_gradient", "oracle_gradient", "relative_error"]

# How far beyond eager PyTorch's own error in a dtype a kernel may be, relative to the largest value. The narrow types'
# is an eighth of their rounding: ties may fall to the other side.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1.2e-4, torch.bfloat16: 1e-3}


def relative_error(x: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """Largest deviation over the largest exact value, or over ``floor`` where that is larger; both finite."""
    if not exact.numel():
        return 0.0
    scale = max(float(exact.abs().max()), floor)
    return float((x.double() - exact).abs().max()) / (scale or 1.0)


def assert_close_to_eager(
    name: str, ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, floor: float = 0.0
) -> None:
    """Our error against float64 is at most eager PyTorch's in the same dtype, plus that dtype's rounding.

    A divergence is a small difference of log-probabilities that are not: ``floor=1.0`` (nat) for losses.
    """
    error, allowed = relative_error(ours, exact, floor), relative_error(eager, exact, floor) + ROUNDING[dtype]
    assert error <= allowed, (
        f"{name}: error {error:.3g} against float64, eager PyTorch and rounding allow {allowed:.3g}"
    )


def oracle_gradient(
    student: Tensor, teacher: Tensor, coef: Tensor, targets: reference.Targets, divergence: Divergence
) -> tuple[Tensor, Tensor, reference.Parts]:
    """(rows,) losses, the gradient of their sum, and the parts, by ``kdfast.loss.reference`` in the dtypes given."""
    leaf = student.detach().clone().requires_grad_()
    loss, parts = reference.dense_rows(leaf, teacher, coef, targets, divergence)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad, parts


def loss_and_gradient(
    student: Tensor, teacher: Tensor | SoftLabels, labels: Tensor | None = None, **options: object
) -> tuple[Tensor, Tensor]:
    """``kd_loss`` and the gradient of its sum with respect to the student, whatever the backward mode."""
    leaf = student.detach().clone().requires_grad_()
    # Not a leaf, which an in-place gradient would refuse.
    loss = kd_loss(leaf * 1.0, teacher, labels, **options)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad
