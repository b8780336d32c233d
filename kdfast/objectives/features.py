"""Hints: features of the student that are to be the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast._checks import check_integer
from kdfast._names import did_you_mean
from kdfast.masks import as_mask
from kdfast.objectives._vectors import check_features, mean_of, unit, widened

__all__ = ["Hint", "Projector"]


class Projector(nn.Module):
    """A linear map of the student's features to the teacher's width; the identity where the widths agree.

    Args:
        student_width, teacher_width: number of features.
        dim: the dimension that holds them: -1 for (N, D) and (N, T, D); 1 for (N, C, H, W), where the map is a
            1 x 1 convolution.

    Raises:
        TypeError, ValueError: a width below 1, or no integer; on a call, features of another width.
    """

    def __init__(self, student_width: int, teacher_width: int, dim: int = -1) -> None:
        super().__init__()
        check_integer("student_width", student_width, least=1)
        check_integer("teacher_width", teacher_width, least=1)
        check_integer("dim", dim)
        self.student_width, self.teacher_width, self.dim = student_width, teacher_width, dim
        same = student_width == teacher_width
        self.map: nn.Module = nn.Identity() if same else nn.Linear(student_width, teacher_width)

    def forward(self, features: Tensor) -> Tensor:
        """The student's features at the teacher's width, in the same layout."""
        self.check(features, "student", self.student_width)
        return self.map(features.movedim(self.dim, -1)).movedim(-1, self.dim)

    def check(self, features: Tensor, name: str, width: int) -> None:
        """Raise ``ValueError`` unless ``features`` have this width in the dimension that holds them."""
        if features.shape[self.dim :][:1] != (width,):
            raise ValueError(f"{name} must have {width} features in dimension {self.dim}, got {tuple(features.shape)}")


class Hint(nn.Module):
    """The mean over positions of a distance between projected student and teacher features (FitNets, Romero 2015)::

        hint = Hint(student_width=64, teacher_width=256, kind="cosine", dim=1)
        loss = hint(student_features, teacher_features)

    ``mse`` and ``smooth_l1`` are means over the features, too; ``cosine`` is 1 - cos, with cos 0 for a zero vector. The
    projector's parameters are trained with the student's: give ``hint.parameters()`` to the optimizer.

    Args:
        student_width, teacher_width, dim: as ``Projector`` takes them.
        kind: "mse", "cosine" or "smooth_l1".

    Raises:
        ValueError: an unknown kind; on a call, shapes that do not fit, or a teacher that requires grad.
    """

    def __init__(self, student_width: int, teacher_width: int, kind: str = "mse", dim: int = -1) -> None:
        super().__init__()
        if not isinstance(kind, str) or kind not in _DISTANCES:
            raise ValueError(
                f"kind must be one of {', '.join(_DISTANCES)}, got {kind!r}{did_you_mean(kind, _DISTANCES, _TERMS)}"
            )
        self.kind = kind
        self.projector = Projector(student_width, teacher_width, dim)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss. ``mask`` is bool, or 0 and 1, of the features' shape without ``dim``: positions that count."""
        check_features(student, teacher)
        dim = self.projector.dim
        self.projector.check(teacher, "teacher", self.projector.teacher_width)
        positions = student.movedim(dim, -1).shape[:-1]
        if positions != teacher.movedim(dim, -1).shape[:-1]:
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} may differ in dimension {dim} "
                "only: pool or interpolate the larger"
            )
        if mask is not None:
            mask = as_mask("mask", mask, positions)
            # Before the map: a NaN must not reach its weights through a position that does not count.
            student, teacher = (torch.where(mask.unsqueeze(dim), x, 0.0) for x in (student, teacher))
        projected = widened(self.projector(student).movedim(dim, -1))
        return mean_of(_DISTANCES[self.kind](projected, widened(teacher.movedim(dim, -1))), mask)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


def _mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean(-1)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1.0 - (unit(x) * unit(y)).sum(-1)


def _smooth_l1(x: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(x, y, reduction="none").mean(-1)


_DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"mse": _mse, "cosine": _cosine, "smooth_l1": _smooth_l1}
)
_TERMS = MappingProxyType({"l2": "mse", "cos": "cosine", "huber": "smooth_l1", "l1": "smooth_l1"})
