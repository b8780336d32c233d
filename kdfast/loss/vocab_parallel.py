"""Losses of rows whose vocabulary the processes of a group share out: a few numbers per row cross between them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.labels import Head, SoftLabels
from kdfast.loss import ops, reference
from kdfast.loss.reference import Targets
from kdfast.loss.vocabulary import Shard
from kdfast.models import check_logits

__all__ = ["in_group", "part_of"]


def in_group(
    logits: Tensor, teacher: ops.Teacher, coef: Tensor, targets: Targets, shard: Shard, gradient: bool
) -> tuple[Tensor, Tensor]:
    """(rows,) losses, the same on every process, and (4, rows) parts.

    Args:
        logits: (rows, V) of this process's columns. With ``gradient`` they are overwritten by their gradient.
        targets: with probabilities of (rows, V), if any.
    """
    leaf = logits.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        loss, parts = _rows(leaf, teacher, coef, targets, shard)
    if gradient and not loss.requires_grad:  # no row counts
        logits.zero_()
    elif gradient:
        once = torch.full_like(loss, 1.0 / dist.get_world_size(shard.group))  # see Shard
        (grad,) = torch.autograd.grad(loss, leaf, once)
        logits.copy_(grad.masked_fill_(leaf == -math.inf, 0.0))
    return loss.detach(), torch.stack(parts)


def _rows(
    logits: Tensor, teacher: ops.Teacher, coef: Tensor, targets: Targets, shard: Shard
) -> tuple[Tensor, reference.Parts]:
    if isinstance(teacher, ops.DenseTeacher):
        return reference.dense_rows(logits, teacher.logits[0], coef, targets, teacher.divergence, shard)
    return reference.sparse_rows(
        student=logits,
        ids=teacher.ids,
        weights=teacher.weights,
        offsets=teacher.offsets,
        tail=teacher.tail,
        vocab=teacher.vocab,
        tail_prototypes=teacher.tail_prototypes,
        coef=coef,
        targets=targets,
        divergence=teacher.divergence,
        v=shard,
    )


def part_of(teacher: Tensor | Head | SoftLabels, shard: Shard) -> Tensor | Head | SoftLabels:
    """The part of a teacher that this process needs. It may be shared out like the student, or whole.

    Raises:
        TypeError: no teacher.
        ValueError: a teacher with another number of columns.
    """
    here = slice(shard.first, shard.first + shard.width)
    if isinstance(teacher, SoftLabels):
        if teacher.vocab_size != shard.columns:
            raise ValueError(f"soft labels in a group are over all {shard.columns} columns, got {teacher.vocab_size}")
        return teacher.shard(here)
    columns = (teacher if isinstance(teacher, Head) else check_logits("teacher", teacher)).shape[-1]
    if columns not in (shard.width, shard.columns):
        raise ValueError(
            f"a teacher in a group has this process's {shard.width} columns or all {shard.columns}, got {columns}"
        )
    if columns == shard.width:
        return teacher
    return teacher[..., here] if isinstance(teacher, Tensor) else teacher.shard(here)
