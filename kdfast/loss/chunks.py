"""How many rows' logits exist at a time, and what a chunk of rows asks of its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.divergences import Divergence
from kdfast.labels.head import OutputLayer
from kdfast.loss import ops
from kdfast.loss.projection import multiply_out
from kdfast.loss.workspace import Workspace, workspace_bytes

__all__ = ["HeadRows", "LogitRows", "SparseRows", "TeacherRows", "rows_per_chunk"]


def rows_per_chunk(rows: int, bytes_per_row: int) -> int:
    """Chunks of about one size, as few as the workspace allows."""
    most = max(1, workspace_bytes() // max(1, bytes_per_row))
    return math.ceil(rows / max(1, math.ceil(rows / most)))


@dataclass(frozen=True)
class LogitRows:
    """A teacher's logits, which exist."""

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
class HeadRows:
    """A teacher's hidden states, whose logits exist a chunk at a time."""

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
class SparseRows:
    """Soft labels of a few entries a row."""

    labels: ops.SparseTeacher

    def bytes_per_row(self) -> int:
        return 0

    def buffer(self, rows: int, space: Workspace) -> Tensor | None:
        return None

    def chunk(self, first: int, last: int, buffer: Tensor | None) -> ops.Teacher:
        """Offsets stay what they are: the entries of all rows are there, and nobody waits for where some begin."""
        all_rows, rows = self.labels, slice(first, last)
        tail = None if all_rows.tail is None else all_rows.tail[rows]
        tail_prototypes = all_rows.tail_prototypes
        if tail_prototypes is not None:
            tail_prototypes = tail_prototypes._replace(prototype_ids=tail_prototypes.prototype_ids[rows])
        return all_rows._replace(offsets=all_rows.offsets[first : last + 1], tail=tail, tail_prototypes=tail_prototypes)


TeacherRows = LogitRows | HeadRows | SparseRows
