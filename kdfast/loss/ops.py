"""The row ops as the losses call them: a teacher, ``coef`` and targets in, losses and gradients out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast._calls import DenseCall, DivergenceNumbers, SparseCall
from kdfast.divergences import Divergence
from kdfast.labels import Prototype, Ragged
from kdfast.loss.dispatch import DENSE_ROWS, ONCE, SCALE_, SPARSE_ROWS, Op, RowOps
from kdfast.loss.reference import TailPrototypes, Targets

__all__ = [
    "DenseTeacher",
    "SparseTeacher",
    "Teacher",
    "row_loss",
    "row_loss_fused",
    "row_loss_inplace",
    "scaled_gradients",
]


class DenseTeacher(NamedTuple):
    """A teacher's logits, and the divergence from its distribution."""

    logits: Tensor  # (outer, inner, V_t)
    divergence: Divergence

    @property
    def ops(self) -> RowOps:
        return DENSE_ROWS

    def arguments(self, coef: Tensor, targets: Targets, want_parts: bool = False) -> DenseCall:
        """What the ops take after the student."""
        numbers = DivergenceNumbers.of(self.divergence)
        return DenseCall(
            teacher=self.logits,
            coef=coef,
            label=targets.label,
            label_probs=targets.probs,
            smoothing=targets.smoothing,
            kind=numbers.kind,
            a=numbers.a,
            b=numbers.b,
            scale=numbers.scale,
            standardize=self.divergence.standardize,
            want_parts=want_parts,
        )


class SparseTeacher(NamedTuple):
    """A few entries of each row, what is known of its tail, and the divergence.

    Without ``tail_prototypes`` that is forward KL or soft cross-entropy: the tail is one more class, or there is none.
    """

    ids: Tensor  # (nnz,) int32
    weights: Tensor  # (nnz,) float32
    offsets: Tensor  # (rows + 1,) int64
    tail: Tensor | None  # (rows,) log-mass
    vocab: int
    divergence: Divergence
    tail_prototypes: TailPrototypes | None = None

    @classmethod
    def of_labels(
        cls, labels: Ragged, divergence: Divergence, temperature: float | Tensor, dtype: torch.dtype
    ) -> SparseTeacher:
        """Labels at one of their temperatures; ``dtype`` is that of ``coef``, which the tail shares."""
        weights, tail = labels.at(temperature)
        tail_prototypes = None
        if isinstance(labels, Prototype):
            tail_prototypes = TailPrototypes(labels.prototype_ids, labels.prototypes)
        return cls(
            ids=labels.ids,
            weights=weights,
            offsets=labels.offsets,
            tail=None if tail is None else tail.to(dtype).contiguous(),
            vocab=labels.vocab_size,
            divergence=divergence,
            tail_prototypes=tail_prototypes,
        )

    @property
    def ops(self) -> RowOps:
        return SPARSE_ROWS

    def arguments(self, coef: Tensor, targets: Targets, want_parts: bool = False) -> SparseCall:
        """What the ops take after the student."""
        numbers, prototypes = DivergenceNumbers.of(self.divergence), self.tail_prototypes
        return SparseCall(
            ids=self.ids,
            weights=self.weights,
            offsets=self.offsets,
            tail=self.tail,
            vocab=self.vocab,
            prototype_ids=None if prototypes is None else prototypes.prototype_ids,
            prototypes=None if prototypes is None else prototypes.prototypes,
            kind=numbers.kind,
            a=numbers.a,
            b=numbers.b,
            scale=numbers.scale,
            coef=coef,
            label=targets.label,
            label_probs=targets.probs,
            smoothing=targets.smoothing,
            want_parts=want_parts,
        )


Teacher = DenseTeacher | SparseTeacher


def row_loss(
    student: Tensor, teacher: Teacher, coef: Tensor, targets: Targets, want_parts: bool = False
) -> tuple[Tensor, Tensor]:
    """(rows,) losses of (outer, inner, V) logits, and (4, rows) parts, or (4, 0) unless they are wanted.

    The backward pass computes the gradient anew, however often it is asked.
    """
    return teacher.ops.losses(student, *teacher.arguments(coef, targets, want_parts))


def row_loss_fused(
    student: Tensor, teacher: Teacher, coef: Tensor, targets: Targets, want_parts: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, and the parts as ``row_loss`` gives them.

    The forward pass computes the gradient too, and keeps it. The backward pass scales it, once.
    """
    return _Fused.apply(  # type: ignore[no-untyped-call]
        student, teacher.ops.grad, *teacher.arguments(coef, targets, want_parts)
    )


def row_loss_inplace(
    student: Tensor, teacher: Teacher, coef: Tensor, targets: Targets, want_parts: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, and the parts as ``row_loss`` gives them.

    The forward pass overwrites the student's logits with the gradient. The backward pass scales it, once.
    """
    return _InPlace.apply(  # type: ignore[no-untyped-call]
        student, teacher.ops.inplace, *teacher.arguments(coef, targets, want_parts)
    )


# ---- gradient in the forward pass -----------------------------------------------------------------------------------

_TWICE = (
    "the gradient that kd_loss computed in its forward pass has been used by an earlier backward; "
    'for several backward passes through one loss use backward="recompute"'
)


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, whose derivative says that there is none."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ONCE)


def scaled_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass saved in ``ctx``, times the upstream scalar, each in its own memory.

    Raises:
        RuntimeError: a second call, as after ``backward(retain_graph=True)``: they have been scaled.
    """
    if not torch.compiler.is_compiling():
        if getattr(ctx, "scaled", False):
            raise RuntimeError(_TWICE)
        ctx.scaled = True
    return tuple(None if grad is None else _scale(grad, upstream) for grad in ctx.saved_tensors)


def _scale(grad: Tensor, upstream: Tensor) -> Tensor:
    with torch.no_grad():
        SCALE_(grad, upstream)
    if torch.is_grad_enabled():  # create_graph=True
        grad = _OnceDifferentiable.apply(  # type: ignore[no-untyped-call]
            grad, torch.zeros((), requires_grad=True)
        )
    return grad


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, op: Op, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, grad, parts = op(student, *arguments)
        return _save_for_backward(ctx, arguments, grad, loss, parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return *scaled_gradients(ctx, upstream), *(None,) * ctx.others


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, op: Op, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, parts = op(student, *arguments)
        torch.autograd.graph.increment_version(student)
        return _save_for_backward(ctx, arguments, student, loss, parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return *scaled_gradients(ctx, upstream), *(None,) * ctx.others


def _save_for_backward(
    ctx: Any, arguments: tuple[Any, ...], grad: Tensor, loss: Tensor, parts: Tensor
) -> tuple[Tensor, Tensor]:
    ctx.save_for_backward(grad)
    ctx.mark_non_differentiable(parts)
    ctx.others = 1 + len(arguments)
    return loss.sum(), parts
