"""The row ops as the losses call them: a teacher, ``coef`` and targets in, losses and gradients out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast._calls import DenseCall, DivergenceNumbers, SparseCall
from kdfast.divergences import Divergence
from kdfast.labels import Prototype, Ragged
from kdfast.loss.derivatives import is_batched, once, saveable
from kdfast.loss.dispatch import (
    DENSE_ROWS,
    LIBRARY,
    SCALE_,
    SPARSE_ROWS,
    Op,
    RowOps,
    reference_dense,
    reference_sparse,
)
from kdfast.loss.projection import without_autocast
from kdfast.loss.reference import BY_VALUE, TailPrototypes, Targets

__all__ = [
    "DenseTeacher",
    "SparseTeacher",
    "Teacher",
    "row_loss",
    "row_loss_eager",
    "row_loss_fused",
    "row_loss_inplace",
    "save_gradients",
    "scaled_gradients",
]


class DenseTeacher(NamedTuple):
    """A teacher's logits, and the divergence from its distribution."""

    logits: Tensor  # (outer, inner, V_t)
    divergence: Divergence

    @property
    def ops(self) -> RowOps:
        return DENSE_ROWS

    @property
    def reference(self) -> Op:
        return reference_dense

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

    @property
    def reference(self) -> Op:
        return reference_sparse

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


def row_loss_eager(
    student: Tensor, teacher: Teacher, coef: Tensor, targets: Targets, want_parts: bool = False
) -> tuple[Tensor, Tensor]:
    """(rows,) losses and parts as ``row_loss`` gives them, by the reference: every kind of derivative, any number."""
    arguments = (saveable(x) if isinstance(x, Tensor) else x for x in teacher.arguments(coef, targets, want_parts))
    with without_autocast(student.device):
        return teacher.reference(student, *arguments, select=BY_VALUE)  # type: ignore[no-any-return]


def row_loss_fused(
    student: Tensor, teacher: Teacher, coef: Tensor, targets: Targets, want_parts: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, and the parts as ``row_loss`` gives them.

    The forward pass computes the gradient too, and keeps it. The backward pass scales it, once.
    """
    arguments = teacher.arguments(coef, targets, want_parts)
    if torch.compiler.is_compiling():
        return _WHOLE[teacher.ops.grad](student, *arguments)  # type: ignore[no-any-return]
    return _Fused.apply(student, teacher.ops.grad, *arguments)  # type: ignore[no-untyped-call]


def row_loss_inplace(
    student: Tensor, teacher: Teacher, coef: Tensor, targets: Targets, want_parts: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, and the parts as ``row_loss`` gives them.

    The forward pass overwrites the student's logits with the gradient. The backward pass scales it, once.
    """
    arguments = teacher.arguments(coef, targets, want_parts)
    if torch.compiler.is_compiling():
        return _WHOLE[teacher.ops.inplace](student, *arguments)  # type: ignore[no-any-return]
    return _InPlace.apply(student, teacher.ops.inplace, *arguments)  # type: ignore[no-untyped-call]


# ---- gradient in the forward pass -----------------------------------------------------------------------------------

_TWICE = (
    "the gradient that kd_loss computed in its forward pass has been used by an earlier backward; "
    'for several backward passes through one loss use backward="recompute"'
)


def save_gradients(ctx: Any, loss: Tensor, *grads: Tensor | None) -> None:
    """Keep for ``scaled_gradients`` what a forward pass computed.

    The loss, a number, stays with them: as autograd hands it back, it leads to what the gradients depend on.
    """
    ctx.set_materialize_grads(False)  # of the parts
    ctx.save_for_backward(*grads, loss)


def scaled_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass saved in ``ctx``, times the upstream scalar, each in its own memory.

    Raises:
        RuntimeError: a second call, as after ``backward(retain_graph=True)``: they have been scaled.
    """
    *grads, loss = ctx.saved_tensors
    if torch.compiler.is_compiling():  # AOTAutograd makes this functional: what is saved stays what it is
        return tuple(None if grad is None else _scale(grad, upstream) for grad in grads)
    if getattr(ctx, "scaled", False):
        raise RuntimeError(_TWICE)
    many = is_batched(upstream)  # is_grads_batched=True: several upstream scalars at once
    ctx.scaled = not many
    scale = _times if many else _scale
    return once((None if grad is None else scale(grad, upstream) for grad in grads), loss, upstream)


def _scale(grad: Tensor, upstream: Tensor) -> Tensor:
    with torch.no_grad():
        SCALE_(grad, upstream)
    return grad


def _times(grad: Tensor, upstream: Tensor) -> Tensor:
    with torch.no_grad():
        return (grad * upstream).to(grad.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, op: Op, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, grad, parts = op(student, *arguments)
        return _saved(ctx, arguments, grad, loss, parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return *scaled_gradients(ctx, upstream), *(None,) * ctx.others


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, op: Op, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, parts = op(student, *arguments)
        torch.autograd.graph.increment_version(student)
        return _saved(ctx, arguments, student, loss, parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return *scaled_gradients(ctx, upstream), *(None,) * ctx.others


def _saved(ctx: Any, arguments: tuple[Any, ...], grad: Tensor, loss: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss.sum()
    save_gradients(ctx, loss, grad)
    ctx.mark_non_differentiable(parts)
    ctx.others = 1 + len(arguments)
    return loss, parts


# ---- what torch.compile sees ----------------------------------------------------------------------------------------


def _whole(op: Op, like: Op, function: type[torch.autograd.Function]) -> Op:
    """One op for ``function`` of ``op``, with the arguments and results of the op ``like``.

    Dynamo would trace the function's two passes apart, and drop what lives between them: that a gradient is used once,
    and has no derivative. A composite op goes into its graph as it is. What runs graphs as they are runs the function,
    and AOTAutograd looks inside.
    """
    name = op.name().removeprefix("kdfast::") + "_whole"
    schema = str(like._schema)
    LIBRARY.define(name + schema[schema.index("(") :])  # type: ignore[no-untyped-call]
    LIBRARY.impl(
        name,
        lambda student, *arguments: function.apply(student, op, *arguments),  # type: ignore[no-untyped-call]
        "CompositeImplicitAutograd",
    )
    return getattr(torch.ops.kdfast, name).default


_WHOLE = {
    **{ops.grad: _whole(ops.grad, ops.losses, _Fused) for ops in (DENSE_ROWS, SPARSE_ROWS)},
    **{ops.inplace: _whole(ops.inplace, ops.inplace, _InPlace) for ops in (DENSE_ROWS, SPARSE_ROWS)},
}
