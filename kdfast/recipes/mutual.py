"""Deep mutual learning: students that teach one another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast.distill.counting import Counting
from kdfast.distill.objective import KD
from kdfast.distill.step import Objective, Step
from kdfast.loss.kd_loss import kd_loss
from kdfast.models import logits_of
from kdfast.recipes._rows import counted_rows
from kdfast.recipes.cohort import each_student

__all__ = ["MutualLearning"]


class MutualLearning(nn.Module):
    """Each student of a ``Cohort`` learns from labels, and from what its peers say of the same batch::

        sum_i ( own_i + peer_weight / (K - 1) * sum_{j != i} T^2 KL(p_j || p_i) ),   p_j held constant

    Source: Zhang et al. 2018. All students move at once, from one step's outputs. The article's co-training loops over
    the students with a teacher variable left over from the loop before, so that later students learn from one teacher
    only; here ``own``, such as an ensemble's objective, gives every student all teachers that the distiller has.

    Args:
        own: each student's objective besides its peers; ``KD()`` without, which is cross-entropy where the distiller
            has no teacher.
        peer_weight, temperature: of the peers' term.

    Raises:
        ValueError: the student is no cohort.
    """

    def __init__(self, own: Objective | None = None, *, peer_weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.own: Objective = KD() if own is None else own
        self.modules_among_them = nn.ModuleList([own] if isinstance(own, nn.Module) else [])
        self.options = getattr(self.own, "options", {})
        self.peer_weight, self.temperature = peer_weight, temperature

    def forward(self, step: Step) -> Tensor:
        steps = each_student(step)
        logits = [logits_of(one.student) for one in steps]
        rule = Counting.of(self)
        counted = counted_rows(step, shift=rule.shift, ignore_index=rule.ignore_index)
        terms = [self.own(one) for one in steps]
        for i, mine in enumerate(logits):
            for peer in logits[:i] + logits[i + 1 :]:
                divergence = kd_loss(mine, peer.detach(), temperature=self.temperature, row_weight=counted)
                terms.append(self.peer_weight / (len(logits) - 1) * divergence)
        return torch.stack(terms).sum()
