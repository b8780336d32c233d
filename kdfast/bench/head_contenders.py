"""The head benchmark's contenders: kdfast, eager PyTorch, torch.compile, and the matrix products by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import Head, SoftLabels, kd_loss
from kdfast.bench.steps import Contenders, Run, compiled, step
from kdfast.labels.head import OutputLayer
from kdfast.loss.chunks import rows_per_chunk
from kdfast.loss.projection import WeightGrad, multiply_out

__all__ = ["TEACHERS", "HeadCase", "head_contenders"]

K = 16


@dataclass(frozen=True)
class HeadCase:
    """A loss from hidden states.

    Attributes:
        teacher: what rows are compared with, a name in ``TEACHERS``.
        rows, columns, width: of hidden states (rows, width) and weight (columns, width).
        dtype: of hidden states and weight.
        logits_dtype: of the logits.
    """

    teacher: str
    rows: int
    columns: int
    width: int
    dtype: torch.dtype
    logits_dtype: torch.dtype = torch.float32

    def inputs(self, device: str, spread: float = 3.0) -> tuple[Tensor, Tensor]:
        """Random hidden states (rows, width) and weight (columns, width), whose logits deviate by ``spread``."""
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(self.rows, self.width, generator=generator, device=device)
        weight = torch.randn(self.columns, self.width, generator=generator, device=device)
        return hidden.to(self.dtype), weight.mul_(spread * self.width**-0.5).to(self.dtype)


def head_contenders(case: HeadCase, device: str, *, compile: bool = True) -> Contenders:
    """The contenders of a case by name, on the same random numbers."""
    hidden, weight = case.inputs(device)
    generator = torch.Generator(device).manual_seed(2)
    labels = torch.randint(case.columns, (case.rows,), generator=generator, device=device)
    losses = TEACHERS[case.teacher](case, hidden, labels)

    def of(loss: Callable[..., Tensor]) -> Run:
        return step(loss, hidden, weight)

    made: Contenders = {name: lambda loss=loss: of(loss) for name, loss in losses.items()}  # type: ignore[misc]
    if compile:
        made["compile"] = compiled(of, losses["eager"])
    return made | {"products": lambda: _products(case, hidden.detach(), weight.detach())}


def _ours(case: HeadCase, teacher: Any, *labels: Tensor, **options: Any) -> Callable[..., Tensor]:
    def loss(h: Tensor, w: Tensor) -> Tensor:
        head = Head(h, w, logits_dtype=case.logits_dtype)
        return kd_loss(head, teacher, *labels, **options)  # type: ignore[no-any-return]

    return loss


def _teacher_logits(case: HeadCase, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(1)
    return torch.randn(case.rows, case.columns, generator=generator, device=like.device).mul_(3).to(case.dtype)


def _soft_cross_entropy(case: HeadCase, hidden: Tensor, labels: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Soft cross-entropy with the teacher's distribution, which ``F.linear_cross_entropy`` computes, too."""
    teacher = _teacher_logits(case, hidden)
    probs = teacher.float().softmax(-1).to(case.dtype)
    losses = {
        "ours": _ours(case, teacher, divergence="soft_ce"),
        "eager": lambda h, w: F.cross_entropy(F.linear(h, w), probs),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["linear_cross_entropy"] = lambda h, w: F.linear_cross_entropy(h, w, probs)
    return losses


def _top_k(case: HeadCase, hidden: Tensor, labels: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Forward KL to labels of a few entries and a tail, and cross-entropy."""
    some = min(64, case.rows)  # their labels are repeated for the others
    logits = torch.randn(some, case.columns, generator=torch.Generator().manual_seed(1)).mul_(3)
    log_probs, ids = (x.repeat(-(-case.rows // some), 1)[: case.rows] for x in logits.log_softmax(-1).topk(K))
    log_probs, ids = log_probs.to(hidden.device), ids.to(hidden.device)
    tails = torch.log1p(-log_probs.exp().sum(-1))
    soft = SoftLabels.topk(ids, log_probs, tails[None], vocab_size=case.columns, temperatures=(1.0,))

    def eager(h: Tensor, w: Tensor) -> Tensor:
        """The loss as distillation frameworks compute it."""
        log_q = F.linear(h, w).float().log_softmax(-1)
        heads = log_q.gather(1, ids)
        rest = torch.log1p(-heads.exp().sum(-1).clamp(max=1 - 1e-6))
        kl = (log_probs.exp() * (log_probs - heads)).sum(-1) + tails.exp() * (tails - rest)
        return kl.mean() + F.nll_loss(log_q, labels)

    return {"ours": _ours(case, soft, labels, ce_weight=1.0), "eager": eager}


def _two_heads(case: HeadCase, hidden: Tensor, labels: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Forward KL to a teacher's head of the same width, and cross-entropy."""
    teacher = Head(*(x.roll(1, 0) for x in case.inputs(str(hidden.device))), logits_dtype=case.logits_dtype)

    def eager(h: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = F.linear(teacher.hidden, teacher.weight).float().log_softmax(-1)
        log_q = F.linear(h, w).float().log_softmax(-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") + F.nll_loss(log_q, labels)

    return {"ours": _ours(case, teacher, labels, ce_weight=1.0), "eager": eager}


TEACHERS: dict[str, Callable[[HeadCase, Tensor, Tensor], dict[str, Callable[..., Tensor]]]] = {
    "soft-ce": _soft_cross_entropy,
    "topk": _top_k,
    "head": _two_heads,
}


def _products(case: HeadCase, hidden: Tensor, weight: Tensor) -> Run:
    """The matrix products of a step, at the shapes and precisions of its chunks, into memory that is allocated before.

    The CPU has no product of narrow numbers that accumulates in wide ones: there the numbers are widened before.
    """
    narrow = case.dtype != case.logits_dtype
    heads = 2 if case.teacher == "head" else 1
    width = heads * case.logits_dtype.itemsize + narrow * case.dtype.itemsize
    rows = rows_per_chunk(case.rows, case.columns * width)
    widened = narrow and not weight.is_cuda
    layer = OutputLayer(weight.to(case.logits_dtype) if widened else weight)
    left = hidden.to(case.logits_dtype) if widened else hidden
    logits = torch.empty(rows, case.columns, dtype=case.logits_dtype, device=weight.device)
    grad = torch.randn(rows, case.columns, device=weight.device).to(case.dtype)
    out = torch.empty_like(hidden)

    def run() -> None:
        sum_ = WeightGrad(weight, -(-case.rows // rows))
        for first in range(0, case.rows, rows):
            here = slice(first, first + rows)
            count = len(hidden[here])
            for _ in range(heads):
                multiply_out(layer, left[here], logits[:count])
            torch.mm(grad[:count], weight, out=out[here])
            sum_.add(grad[:count], hidden[here])

    return run
