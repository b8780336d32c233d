"""Losses from hidden states: logits exist for a chunk of rows at a time, and become their gradient where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.labels.head import Head, OutputLayer
from kdfast.loss import ops
from kdfast.loss.chunks import ChunkedRows, Outcome, flat_head
from kdfast.loss.derivatives import once, refuse_batched, saveable
from kdfast.loss.projection import WeightGrad, multiply_out, slope_of_cap, without_autocast
from kdfast.loss.saved import save, saved
from kdfast.loss.workspace import Workspace

__all__ = ["logits_of_head", "loss_by_chunks"]


def loss_by_chunks(student: Tensor | Head, rows: ChunkedRows, backward: str, reduction: str) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, or (rows,) losses for ``reduction="none"``; and (4, rows) parts, if wanted.

    Args:
        student: (rows, V) logits, or a head with (rows, d) hidden states.
    """
    late = backward == "recompute" or reduction == "none" or student.dtype == torch.float64
    with without_autocast(rows.coef.device):
        if isinstance(student, Head):
            late, (loss, parts) = _of_head(student, rows, late)
        else:
            late, (loss, parts) = _of_logits(student, rows, late, backward == "inplace")
    return loss.sum() if late and reduction != "none" else loss, parts


def _of_head(student: Head, rows: ChunkedRows, late: bool) -> tuple[bool, tuple[Tensor, Tensor]]:
    """Whether the losses are still those of the rows, not their sum; and they, with the parts."""
    # GradScaler has not scaled a float16 gradient yet. The caller's own is added to in a backward pass: how often a
    # forward pass runs, and whether anything comes of it, is for checkpoints and the caller to say.
    late = late or student.hidden.dtype == torch.float16 or student.weight_grad is not None
    options = _Options(student.scale, student.softcap, student.dtype, student.weight_grad)
    inputs = student.hidden, student.weight, student.bias
    if not _train(inputs):
        out = _losses(options.student(*inputs), rows)
        return True, (out.loss, out.parts)
    return late, (_Recomputed if late else _Fused).apply(*inputs, options, rows)  # type: ignore[no-untyped-call]


def _of_logits(logits: Tensor, rows: ChunkedRows, late: bool, inplace: bool) -> tuple[bool, tuple[Tensor, Tensor]]:
    """As ``_of_head``, of (rows, V) logits, which are overwritten ``inplace``."""
    if not _train([logits]):
        out = _losses_of_logits(logits, rows)
        return True, (out.loss, out.parts)
    if late or logits.dtype == torch.float16:
        return True, _RecomputedLogits.apply(logits, rows)  # type: ignore[no-untyped-call]
    return False, _FusedLogits.apply(logits, rows, inplace)  # type: ignore[no-untyped-call]


def _train(inputs: Iterable[Tensor | None]) -> bool:
    """Whether anybody will ask for a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def logits_of_head(head: Head) -> Tensor:
    """(..., V) logits of all rows at once, as the losses multiply them out, under autograd."""
    head, shape = flat_head(head, None), head.shape
    hidden, layer, dtype = saveable(head.hidden), head.layer, head.dtype
    with without_autocast(head.device):
        x = hidden.to(dtype) @ saveable(layer.weight).to(dtype).T
        if layer.bias is not None:
            x = x + saveable(layer.bias).to(dtype)
        if layer.scale != 1.0:
            x = x * layer.scale
        return (x if layer.softcap is None else layer.softcap * torch.tanh(x / layer.softcap)).view(shape)


# ---- the student has a head -----------------------------------------------------------------------------------------


class _Student(NamedTuple):
    layer: OutputLayer
    hidden: Tensor  # (rows, d), of the weight's dtype
    dtype: torch.dtype  # of the logits
    weight_grad: Tensor | None = None  # the caller's own

    def bytes_per_row(self, trains: bool) -> int:
        """Memory for a row of logits and, in training, the slope of a cap and the gradient in the weight's dtype."""
        wide, narrow = self.dtype.itemsize, self.hidden.element_size() * (self.hidden.dtype != self.dtype)
        capped = self.layer.softcap is not None
        return self.layer.weight.shape[0] * (wide + trains * (narrow + wide * capped))


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _losses(student: _Student, rows: ChunkedRows) -> Outcome:
    """Losses and parts without a gradient: one matrix product."""
    out, logits = Outcome(rows), None
    with rows.workspace() as space:
        for first, last, buffer in rows.chunks(student.bytes_per_row(trains=False), space):
            if logits is None:
                logits = space.empty(last - first, student.layer.vocab_size, student.dtype)
            x = logits[: last - first]
            multiply_out(student.layer, student.hidden[first:last], x)
            out.put(first, last, rows.loss(x, first, last, buffer, gradient=False))
    return out


def _gradients(student: _Student, rows: ChunkedRows, wanted: tuple[bool, bool, bool]) -> tuple[Outcome, _Gradients]:
    """Losses and parts, and the gradients of their sum for hidden states, weight and bias as ``wanted``: 3 products."""
    out, backward = Outcome(rows), None
    with rows.workspace() as space:
        for first, last, buffer in rows.chunks(student.bytes_per_row(trains=True), space):
            if backward is None:
                backward = _Backward(student, last - first, rows.count, wanted, space)
            hidden, x = student.hidden[first:last], backward.logits[: last - first]
            multiply_out(student.layer, hidden, x)
            backward.before(x)
            out.put(first, last, rows.loss(x, first, last, buffer, gradient=True))
            backward.add(x, hidden, first, last)
        if backward is None:
            backward = _Backward(student, 0, 0, wanted, space)
        grads = backward.take()
    if rows.shard is not None and grads.hidden is not None:
        grads = grads._replace(hidden=rows.shard.add_up(grads.hidden))
    return out, grads


class _Backward:
    """Turns the logits' gradient into that of what made them, chunk after chunk of at most ``chunk`` rows."""

    def __init__(
        self, student: _Student, chunk: int, rows: int, wanted: tuple[bool, bool, bool], space: Workspace
    ) -> None:
        layer, hidden = student.layer, student.hidden
        self._layer = layer
        self.logits = space.empty(chunk, layer.vocab_size, student.dtype)
        self._slope = None if layer.softcap is None else space.empty(chunk, layer.vocab_size, student.dtype)
        self._narrow = None if hidden.dtype == student.dtype else space.empty(chunk, layer.vocab_size, hidden.dtype)
        self._hidden = torch.empty_like(hidden) if wanted[0] else None
        chunks = 0 if rows == 0 else -(-rows // chunk)
        self._weight = WeightGrad(layer.weight, chunks, student.weight_grad) if wanted[1] else None
        self._bias = (
            layer.bias.new_zeros(layer.bias.shape, dtype=student.dtype)
            if wanted[2] and layer.bias is not None
            else None
        )

    def before(self, logits: Tensor) -> None:
        """Note what the gradient will need of the logits, whose place it takes."""
        if self._slope is not None and self._layer.softcap is not None:
            slope_of_cap(logits, self._layer.softcap, self._slope[: len(logits)])

    def add(self, grad: Tensor, hidden: Tensor, first: int, last: int) -> None:
        """Take in a chunk's gradient, which is overwritten."""
        if self._slope is not None:
            grad *= self._slope[: len(grad)]
        if self._layer.scale != 1.0:
            grad *= self._layer.scale
        if self._bias is not None:
            self._bias += grad.sum(0)
        if self._narrow is not None:
            grad = self._narrow[: len(grad)].copy_(grad)
        if self._hidden is not None:
            torch.mm(grad, self._layer.weight, out=self._hidden[first:last])
        if self._weight is not None:
            self._weight.add(grad, hidden)

    def take(self) -> _Gradients:
        """The gradients, once all chunks are in."""
        weight = None if self._weight is None else self._weight.take()
        bias = None if self._bias is None or self._layer.bias is None else self._bias.to(self._layer.bias.dtype)
        return _Gradients(self._hidden, weight, bias)


class _Options(NamedTuple):
    """A student's head without the tensors that autograd knows of."""

    scale: float
    softcap: float | None
    dtype: torch.dtype
    weight_grad: Tensor | None

    def student(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Student:
        layer = OutputLayer(weight, bias, scale=self.scale, softcap=self.softcap)
        return _Student(layer, hidden, self.dtype, self.weight_grad)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options, rows: ChunkedRows
    ) -> Any:
        out, grads = _gradients(options.student(hidden, weight, bias), rows, ctx.needs_input_grad[:3])
        loss = out.loss.sum()
        ops.save_gradients(ctx, loss, *grads)
        ctx.mark_non_differentiable(out.parts)
        return loss, out.parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return *ops.scaled_gradients(ctx, upstream), None, None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options, rows: ChunkedRows
    ) -> Any:
        out = _losses(options.student(hidden, weight, bias), rows)
        save(ctx, hidden, weight, bias, rows)
        ctx.options = options
        ctx.mark_non_differentiable(out.parts)
        return out.loss, out.parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        refuse_batched(upstream)
        *inputs, rows = saved(ctx)
        with torch.no_grad():
            student = ctx.options.student(*inputs)
            grads = _gradients(student, rows.times(upstream), ctx.needs_input_grad[:3])[1]
        return *once(grads, *inputs, upstream), None, None


# ---- the student's logits exist, the teacher's do not ---------------------------------------------------------------


def _gradient_of_logits(logits: Tensor, rows: ChunkedRows, grad: Tensor) -> Outcome:
    """Losses and parts; the gradient of their sum goes into ``grad``, which may be the logits' own memory."""
    out = Outcome(rows)
    with rows.workspace() as space:
        for first, last, buffer in rows.chunks(0, space):
            chunk = grad[first:last]
            if grad is not logits:
                chunk.copy_(logits[first:last])
            out.put(first, last, rows.loss(chunk, first, last, buffer, gradient=True))
    return out


def _losses_of_logits(logits: Tensor, rows: ChunkedRows) -> Outcome:
    out = Outcome(rows)
    with rows.workspace() as space:
        for first, last, buffer in rows.chunks(0, space):
            out.put(first, last, rows.loss(logits[first:last], first, last, buffer, gradient=False))
    return out


class _FusedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: ChunkedRows, inplace: bool) -> Any:
        grad = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        out = _gradient_of_logits(logits, rows, grad)
        if inplace:
            torch.autograd.graph.increment_version(logits)
        loss = out.loss.sum()
        ops.save_gradients(ctx, loss, grad)
        ctx.mark_non_differentiable(out.parts)
        return loss, out.parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return *ops.scaled_gradients(ctx, upstream), None, None


class _RecomputedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: ChunkedRows) -> Any:
        out = _losses_of_logits(logits, rows)
        save(ctx, logits, rows)
        ctx.mark_non_differentiable(out.parts)
        return out.loss, out.parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        refuse_batched(upstream)
        logits, rows = saved(ctx)
        with torch.no_grad():
            grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
            _gradient_of_logits(logits, rows.times(upstream), grad)
        return *once([grad], logits, upstream), None
