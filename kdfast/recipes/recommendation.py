"""Recommendation: scores of items, as a distribution over them, or as the order they are in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.loss.kd_loss import kd_loss
from kdfast.recipes._alike import require_alike, require_mask

__all__ = ["listwise_kd", "ranking_distillation"]


def listwise_kd(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, *, candidates: Tensor, **options: Any
) -> Tensor:
    """``kd_loss`` over the softmax of each list's candidates: ListNet's top-one probabilities (Cao et al. 2007).

    Args:
        student, teacher: (lists, items) scores.
        labels: (lists,) the item that was taken, where ``options`` have a ``ce_weight``.
        candidates: (lists, items) bool: the others are padding, or seen before, and have no probability on either
            side. A list without candidates does not count.
        options: ``kd_loss``'s: ``temperature``, ``ce_weight``, ``divergence``, ... Not ``row_weight``.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    require_alike("teacher", student=student, teacher=teacher)
    require_mask("candidates", candidates, student.shape)
    s, t = (scores.masked_fill(~candidates, -torch.inf) for scores in (student, teacher))
    loss: Tensor = kd_loss(s, t, labels, row_weight=candidates.any(-1), **options)
    return loss


def ranking_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int,
    candidates: Tensor | None = None,
    decay: float = 10.0,
    sharpness: float = 0.1,
) -> Tensor:
    """The teacher's first k items as if a user had taken them: ``-sum_r w_r log sigmoid(s[item_r])``, mean over lists.

    Ranking Distillation (Tang & Wang 2018): w_r is proportional to exp(-r / decay), the early places
    counting most, times tanh(max(sharpness * (the student's rank of item_r - r), 0)), so that items which the student
    ranks high enough have no loss; then normalised over the k places. The paper samples the student's ranks, which here
    are exact. It is added to a loss of what users took, for nothing in it holds other items down.

    Args:
        student, teacher: (lists, items) scores.
        k: places of the teacher's order.
        candidates: (lists, items) bool: items that can be recommended; at least k in each list.
        decay: in places.
        sharpness: per place; 0 switches the second factor off.

    Raises:
        TypeError, ValueError: bad arguments.
    """
    require_alike("teacher", student=student, teacher=teacher)
    candidates = torch.ones_like(student, dtype=torch.bool) if candidates is None else candidates
    require_mask("candidates", candidates, student.shape)
    fewest = int(candidates.sum(-1).min())
    if not 1 <= k <= fewest:
        raise ValueError(f"k must lie in 1 ... {fewest}, which is how many candidates the shortest list has, got {k}")
    top = teacher.masked_fill(~candidates, -torch.inf).topk(k).indices
    place = torch.arange(k, dtype=student.dtype, device=student.device)
    weight = (-place / decay).exp().expand(top.shape)
    if sharpness > 0:
        scores = student.detach().masked_fill(~candidates, -torch.inf)
        rank = (scores[:, None] > scores.gather(1, top)[..., None]).sum(-1)
        weight = weight * (sharpness * (rank - place)).clamp(min=0).tanh()
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return -(weight * nn.functional.logsigmoid(student.gather(1, top))).sum(-1).mean()
