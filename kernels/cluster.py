"""The row ops by the one-read CUDA kernels of ``csrc/cuda``, and which calls these support.

A cluster of thread blocks shares out a row, holds it on the chip, and reads it once. Calls that are not supported run
the Triton kernels. This module needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import kdfast._C as _C
from kdfast._calls import KINDS, DenseCall, SparseCall

__all__ = ["ROWS_ON_CHIP", "dense_rows", "fullest", "is_built", "plan", "size_for", "sparse_rows", "supports"]

# Divergences that are no sums over a row's columns; the kernels compute every other one.
UNSUPPORTED = ("dkd", "logit_mse")
ROWS_ON_CHIP = {"dense_rows": 2, "sparse_rows": 1}  # rows that a cluster holds for each of the student's
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITIES = ((9, 0), (10, 0), (10, 3))  # with clusters, and the shared memory for three blocks on a multiprocessor


@cache
def is_built() -> bool:
    """Whether this build has the kernels: it was compiled with nvcc."""
    return hasattr(torch.ops.kdfast, "dense_rows_cluster")


@cache
def _runs_on(index: int) -> bool:
    return torch.cuda.get_device_capability(index) in CAPABILITIES


def plan(op: str, columns: int, dtype: torch.dtype) -> int:
    """The fewest thread blocks that can share a row of ``columns``; 0: no cluster has room for one.

    Args:
        op: ``dense_rows`` or ``sparse_rows``.
        columns: the student's vocabulary.
        dtype: of both sides' logits.
    """
    size: int = _C.cluster_size(ROWS_ON_CHIP[op] * columns * dtype.itemsize)
    return size


@cache
def size_for(op: str, columns: int, dtype: torch.dtype, index: int) -> int:
    """Thread blocks that share a row on CUDA device ``index``; 0: rows are too wide, or a part of a GPU has no room."""
    row = torch.empty(1, 1, columns, dtype=dtype, device=torch.device("cuda", index))
    enough = 2 * torch.cuda.get_device_properties(index).multi_processor_count
    resident = getattr(torch.ops.kdfast, f"{op}_resident")
    return fullest(plan(op, columns, dtype), enough, lambda size: resident(row, size))


def fullest(smallest: int, enough: int, resident: Callable[[int], int]) -> int:
    """The smallest cluster, of at least ``smallest`` blocks, of which ``enough`` blocks are resident at a time.

    Where none has enough, the one with most; 0 where ``smallest`` is 0 or none fits. Two blocks on each multiprocessor
    are enough: while one loads, another computes and stores.
    """
    best, most = 0, 0
    for size in (1, 2, 4, 8, 16):
        if 0 < smallest <= size and most < enough:
            blocks = resident(size)
            best, most = (size, blocks) if blocks > most else (best, most)
    return best


def supports(op: str, student: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Whether the kernels serve a call of ``dense_rows`` or ``sparse_rows``, or of a gradient form.

    Args:
        op: ``dense_rows`` or ``sparse_rows``.
        student: (outer, inner, vocabulary).
        arguments: the others of the op.
    """
    if not (is_built() and student.is_cuda and student.dtype in DTYPES and _runs_on(student.device.index)):
        return False
    call: DenseCall | SparseCall
    if op == "dense_rows":
        call = DenseCall(*arguments)
        served = call.teacher.dtype == student.dtype and not call.standardize and KINDS[call.kind] not in UNSUPPORTED
        teacher_columns = call.teacher.shape[2]
    else:
        call = SparseCall(*arguments)
        served, teacher_columns = call.prototypes is None, call.vocab
    served = served and call.label_probs is None and not call.want_parts and teacher_columns >= student.shape[2]
    return served and _size_for(op, student) > 0


def _size_for(op: str, student: Tensor) -> int:
    assert student.device.index is not None
    return size_for(op, student.shape[2], student.dtype, student.device.index)


def dense_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The losses of student rows against teacher rows, and their gradient, for a call that ``supports`` serves.

    Args:
        student: (outer, inner, vocabulary) on a CUDA device.
        grad: like ``student``, where the gradient of the losses' sum goes; None: none is wanted.
        arguments: the others of ``torch.ops.kdfast.dense_rows``.

    Returns:
        (rows,) float32 losses and (4, 0) parts.
    """
    call = DenseCall(*arguments)
    coef = call.coef.contiguous()
    loss = torch.ops.kdfast.dense_rows_cluster(
        student,
        call.teacher,
        coef,
        call.label,
        call.smoothing,
        call.kind,
        call.a,
        call.b,
        call.scale,
        grad,
        _size_for("dense_rows", student),
    )
    return loss, coef.new_empty(4, 0)


def sparse_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The losses of student rows against cached entries, and their gradient, for a call that ``supports`` serves.

    Args:
        student: (outer, inner, vocabulary) on a CUDA device.
        grad: like ``student``, where the gradient of the losses' sum goes; None: none is wanted.
        arguments: the others of ``torch.ops.kdfast.sparse_rows``.

    Returns:
        (rows,) float32 losses and (4, 0) parts.
    """
    call = SparseCall(*arguments)
    coef, keep = call.coef.contiguous(), KINDS[call.kind] == "forward_kl"
    entries, size = (call.ids, call.weights, call.offsets, call.tail), _size_for("sparse_rows", student)
    loss = torch.ops.kdfast.sparse_rows_cluster(student, *entries, coef, call.label, call.smoothing, keep, grad, size)
    return loss, coef.new_empty(4, 0)
