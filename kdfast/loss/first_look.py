"""A look at the values of a call's first tensors, for mistakes that would train silently.

Looking costs a sweep, and on a device it would wait. So it is done once for every place in the user's code that calls
the loss, on CPU tensors; ``KDFAST_CHECK=1`` does it for every call and every device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from kdfast._checks import can_look
from kdfast.labels import Dense, Head, SoftLabels, TopK
from kdfast.labels.ragged import Tailed
from kdfast.models import look_like_probabilities

__all__ = ["ROUNDING", "look_closely", "look_once", "not_log_probs", "not_log_tails"]

_Place = tuple[str, int, int, int]
ROUNDING = 1e-2  # stored values are rounded, and so is what they sum to
_seen: set[_Place] = set()  # places whose first call was in order


def look_once(student: Tensor | Head, teacher: Tensor | Head | SoftLabels) -> None:
    """Raise ``ValueError`` for probabilities in logits' or logarithms' place, at a new place in the user's code."""
    if torch.compiler.is_compiling():
        return
    place = _place(student.shape[-1])
    if place in _seen or not can_look(student if isinstance(student, Tensor) else student.hidden):
        return
    _refuse_probabilities(pair for pair in _logits(student, teacher) if can_look(pair[1]))
    if isinstance(teacher, Tailed) and can_look(teacher.tails):
        _look_at_entries(teacher)
    if student.shape.numel():
        _seen.add(place)


def look_closely(student: Tensor | Head, teacher: Tensor | Head | SoftLabels) -> None:
    """What ``look_once`` does, whatever place it is and whatever device, which it waits for."""
    _refuse_probabilities(_logits(student, teacher))


def _logits(student: Tensor | Head, teacher: Tensor | Head | SoftLabels) -> list[tuple[str, Tensor]]:
    """Those that are at hand, each with its name."""
    named = (("student", student), ("teacher", teacher.values if isinstance(teacher, Dense) else teacher))
    return [(name, x) for name, x in named if isinstance(x, Tensor)]


def _refuse_probabilities(named: Iterable[tuple[str, Tensor]]) -> None:
    for name, x in named:
        if _are_probabilities(x.detach()):
            raise ValueError(
                f"{name} holds probabilities (rows in [0, 1] that sum to 1), and kd_loss takes logits: leave the "
                "softmax out, or give their logarithms"
            )


def _are_probabilities(x: Tensor) -> bool:
    # The first row nearly always says no.
    first = x[(0,) * (x.dim() - 1)] if x.numel() else x
    return bool(((first >= 0) & (first <= 1)).all()) and look_like_probabilities(x)


def _look_at_entries(labels: Tailed) -> None:
    """Raise ``ValueError`` for probabilities in their logarithms' place.

    A row's entries are normalised to what its tail leaves, so logits may stand there: only numbers in [0, 1] throughout
    are taken for probabilities.
    """
    tails, entries = labels.tails, labels.values[~labels.padding]
    if isinstance(labels, TopK) and entries.numel() and float(entries.min()) >= 0.0:
        most = float(entries.max())
        if ROUNDING < most <= 1.0 + ROUNDING:
            raise not_log_probs(most)
    if tails.numel() and float(tails.max()) > ROUNDING:
        raise not_log_tails(labels)


def not_log_probs(most: float) -> ValueError:
    """The error of top-k labels whose largest log-probability is ``most``."""
    return ValueError(
        f"log_probs of topk soft labels must not be positive, got {most:.4g}: of probabilities probs.log()"
    )


def not_log_tails(labels: Tailed) -> ValueError:
    """The error of labels whose tails are no logarithms of probabilities."""
    return ValueError(
        f"tails of {labels.kind} soft labels are logarithms of probabilities, got {float(labels.tails.max()):.4g}: "
        "tail.log()"
    )


def _place(columns: int) -> _Place:
    """Where the user's code calls the loss: the innermost frame that is neither this package's nor PyTorch's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("kdfast.", "torch.")):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, frame.f_lasti, columns
