"""A loss of rows that come in chunks: how many at a time, the teacher of each chunk, and the losses of all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kdfast.divergences import Divergence
from kdfast.labels import Head, Hidden, OutputLayer, Ragged, SoftLabels
from kdfast.loss import ops
from kdfast.loss.dispatch import scaled_coefficients
from kdfast.loss.projection import multiply_out
from kdfast.loss.reference import Targets
from kdfast.loss.row_layout import RowLayout
from kdfast.loss.vocab_parallel import in_group
from kdfast.loss.vocabulary import Shard
from kdfast.loss.workspace import Workspace, workspace_bytes
from kdfast.models import autocast_dtype

__all__ = ["ChunkedRows", "Outcome", "flat_head", "rows_per_chunk", "teacher_chunks"]


def rows_per_chunk(rows: int, bytes_per_row: int) -> int:
    """How many rows a chunk has: chunks of about one size, as few of them as the workspace allows."""
    most = max(1, workspace_bytes() // max(1, bytes_per_row))
    return math.ceil(rows / max(1, math.ceil(rows / most)))


class TeacherChunks(Protocol):
    """A teacher of all rows of a loss that takes some of them at a time."""

    def bytes_per_row(self) -> int:
        """The memory that a chunk needs for each of its rows."""

    def buffer(self, rows: int, space: Workspace) -> Tensor | None:
        """Memory for chunks of at most ``rows`` rows, one after another; None for a teacher that needs none."""

    def chunk(self, first: int, last: int, buffer: Tensor | None) -> ops.Teacher:
        """The teacher of rows ``first`` to ``last``, which may lie in ``buffer``."""


@dataclass(frozen=True)
class LogitChunks:
    """Chunks of a teacher's logits, which exist."""

    logits: Tensor  # (1, rows, V)
    divergence: Divergence
    kept: Tensor | None = None  # which of the rows; None: all

    def bytes_per_row(self) -> int:
        return 0 if self.kept is None else self.logits.shape[2] * self.logits.element_size()

    def buffer(self, rows: int, space: Workspace) -> Tensor | None:
        return None

    def chunk(self, first: int, last: int, buffer: Tensor | None) -> ops.Teacher:
        if self.kept is None:
            return ops.DenseTeacher(self.logits[:, first:last], self.divergence)
        return ops.DenseTeacher(self.logits.index_select(1, self.kept[first:last]), self.divergence)


@dataclass(frozen=True)
class HeadChunks:
    """Chunks of logits that are made of a teacher's hidden states, one chunk at a time."""

    hidden: Tensor  # (rows, d)
    layer: OutputLayer
    divergence: Divergence
    dtype: torch.dtype  # of the logits

    def bytes_per_row(self) -> int:
        return self.layer.weight.shape[0] * self.dtype.itemsize

    def buffer(self, rows: int, space: Workspace) -> Tensor | None:
        return space.empty(rows, self.layer.vocab_size, self.dtype)

    def chunk(self, first: int, last: int, buffer: Tensor | None) -> ops.Teacher:
        assert buffer is not None
        logits = buffer[: last - first]
        multiply_out(self.layer, self.hidden[first:last], logits)
        return ops.DenseTeacher(logits[None], self.divergence)


@dataclass(frozen=True)
class SparseChunks:
    """Chunks of soft labels of a few entries a row."""

    labels: ops.SparseTeacher

    def bytes_per_row(self) -> int:
        return 0

    def buffer(self, rows: int, space: Workspace) -> Tensor | None:
        return None

    def chunk(self, first: int, last: int, buffer: Tensor | None) -> ops.Teacher:
        # Offsets stay what they are: the entries of all rows are there, and nobody waits for where some begin.
        all_rows, rows = self.labels, slice(first, last)
        tail = None if all_rows.tail is None else all_rows.tail[rows]
        tail_prototypes = all_rows.tail_prototypes
        if tail_prototypes is not None:
            tail_prototypes = tail_prototypes._replace(prototype_ids=tail_prototypes.prototype_ids[rows])
        return all_rows._replace(offsets=all_rows.offsets[first : last + 1], tail=tail, tail_prototypes=tail_prototypes)


def teacher_chunks(
    teacher: Tensor | Head | SoftLabels,
    count: int,
    divergence: Divergence,
    temperature: float | Tensor,
    dtype: torch.dtype,
    kept: Tensor | None,
) -> TeacherChunks:
    """A teacher of ``count`` rows, or of those that are ``kept``, for a loss that takes some of them at a time.

    Args:
        temperature: the teacher's, which labels of a few entries must hold.
        dtype: of the loss's coefficients.
    """
    if isinstance(teacher, Tensor):
        return LogitChunks(RowLayout.lay_out(teacher).reshape(1, count, teacher.shape[-1]), divergence, kept)
    if isinstance(teacher, Head):
        teacher = flat_head(teacher, kept)
        return _head_chunks(teacher.hidden, teacher.layer, divergence, teacher.dtype)
    if kept is not None:
        teacher = teacher[kept]
    if isinstance(teacher, Hidden):
        return _head_chunks(teacher.values, teacher.require_head(), divergence, torch.float32)
    if isinstance(teacher, Ragged):
        return SparseChunks(ops.SparseTeacher.of_labels(teacher, divergence, temperature, dtype))
    return LogitChunks(RowLayout.lay_out(teacher.to_dense().values), divergence)


def flat_head(head: Head, kept: Tensor | None) -> Head:
    """A head of (rows, d) hidden states, all or those of the rows ``kept``, in autocast's dtype where that is on."""
    hidden, weight = head.hidden.reshape(-1, head.hidden.shape[-1]), head.weight
    if (dtype := autocast_dtype(hidden.device)) is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return replace(head, hidden=(hidden if kept is None else hidden[kept]).contiguous(), weight=weight)


def _head_chunks(hidden: Tensor, layer: OutputLayer, divergence: Divergence, dtype: torch.dtype) -> HeadChunks:
    bias = None if layer.bias is None else layer.bias.detach()
    return HeadChunks(hidden.detach(), replace(layer, weight=layer.weight.detach(), bias=bias), divergence, dtype)


# ---- the loss's rows ------------------------------------------------------------------------------------------------

# Numbers per column that the formulas of a shared vocabulary keep for their gradient, logits and what they come with.
KEPT_IN_GROUP = 20


@dataclass(frozen=True)
class ChunkedRows:
    """All rows of a loss: what the student's logits, which come in chunks, are compared with."""

    teacher: TeacherChunks
    coef: Tensor  # (5, rows)
    targets: Targets
    want_parts: bool
    shard: Shard | None = None  # of the vocabulary that is here; None: all of it

    @property
    def count(self) -> int:
        return self.coef.shape[1]

    def workspace(self) -> Workspace:
        """Memory for chunks, on the loss's device."""
        return Workspace(self.coef.device)

    def times(self, upstream: Tensor) -> ChunkedRows:
        """Return the rows with their losses multiplied by ``upstream``, (rows,)."""
        return replace(self, coef=scaled_coefficients(self.coef, upstream), want_parts=False)

    def chunks(self, bytes_per_row: int, space: Workspace) -> Iterator[tuple[int, int, Tensor | None]]:
        """The first row of each chunk, the row after its last, and the teacher's buffer."""
        bytes_per_row += self.teacher.bytes_per_row()
        if self.shard is not None:  # the same on every process, as their chunks must be
            bytes_per_row = KEPT_IN_GROUP * self.shard.widest * self.coef.element_size()
        rows = rows_per_chunk(self.count, bytes_per_row)
        buffer = self.teacher.buffer(rows, space)
        for first in range(0, self.count, max(1, rows)):
            yield first, min(first + rows, self.count), buffer

    def loss(
        self, logits: Tensor, first: int, last: int, buffer: Tensor | None, *, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Losses and parts of (last - first, V) logits, whose place their gradient takes if it is asked for."""
        teacher = self.teacher.chunk(first, last, buffer)
        targets, coef = self.targets.of_rows(slice(first, last)), self.coef[:, first:last].contiguous()
        if self.shard is not None:
            loss, parts = in_group(logits, teacher, coef, targets, self.shard, gradient)
            return loss, parts if self.want_parts else parts[:, :0]
        targets = targets._replace(probs=None if targets.probs is None else targets.probs[None])
        op = teacher.ops.inplace if gradient else teacher.ops.losses
        return op(logits[None], *teacher.arguments(coef, targets, self.want_parts))  # type: ignore[no-any-return]


class Outcome:
    """The losses and parts of all rows, which come chunk after chunk."""

    def __init__(self, rows: ChunkedRows) -> None:
        self.loss = rows.coef.new_empty(rows.count)
        self.parts = rows.coef.new_empty(4, rows.count if rows.want_parts else 0)

    def put(self, first: int, last: int, results: tuple[Tensor, Tensor]) -> None:
        """Note a chunk's losses and parts."""
        loss, parts = results
        self.loss[first:last] = loss
        if parts.shape[1]:
            self.parts[:, first:last] = parts
