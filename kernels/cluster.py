"""The one-read CUDA kernels as launchers of the row ops, and the table that says which rows they take.

They hold a row on the chip, shared out among the thread blocks of a cluster, and read it once. Whatever they do not
take runs the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import kdfast._C as _C
from kdfast._calls import DenseCall, SparseCall

__all__ = ["HELD", "dense_rows", "fullest", "is_built", "plan", "size_for", "sparse_rows", "takes"]

KINDS: tuple[str, ...] = _C.divergences()
WITHOUT = ("dkd", "logit_mse")  # which need more than a row's sums
HELD = {"dense_rows": 2, "sparse_rows": 1}  # rows that a cluster holds for each of the student's
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITIES = ((9, 0), (10, 0), (10, 3))  # with clusters, and the shared memory for three blocks on a multiprocessor


@cache
def is_built() -> bool:
    """Whether this build has them: it was compiled with nvcc."""
    return hasattr(torch.ops.kdfast, "dense_rows_cluster")


@cache
def _runs_on(index: int) -> bool:
    return torch.cuda.get_device_capability(index) in CAPABILITIES


def plan(op: str, columns: int, dtype: torch.dtype) -> int:
    """The fewest thread blocks that can share a row; 0: these kernels do not take rows of this width."""
    size: int = _C.cluster_size(HELD[op] * columns * dtype.itemsize)
    return size


@cache
def size_for(op: str, columns: int, dtype: torch.dtype, index: int) -> int:
    """Thread blocks that share a row on a device; 0: these kernels do not, as where a part of a GPU has no room."""
    row = torch.empty(1, 1, columns, dtype=dtype, device=torch.device("cuda", index))
    enough = 2 * torch.cuda.get_device_properties(index).multi_processor_count
    resident = getattr(torch.ops.kdfast, f"{op}_resident")
    return fullest(plan(op, columns, dtype), enough, lambda size: resident(row, size))


def fullest(smallest: int, enough: int, resident: Callable[[int], int]) -> int:
    """The smallest cluster of which ``enough`` blocks are resident at a time, or of which most are.

    Two on each multiprocessor are enough: while one loads, another computes and stores.
    """
    best, most = 0, 0
    for size in (1, 2, 4, 8, 16):
        if 0 < smallest <= size and most < enough:
            blocks = resident(size)
            best, most = (size, blocks) if blocks > most else (best, most)
    return best


def takes(op: str, student: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Whether these kernels serve a call of ``dense_rows`` or ``sparse_rows``, or of its gradient forms."""
    if not (is_built() and student.is_cuda and student.dtype in DTYPES and _runs_on(student.device.index)):
        return False
    call: DenseCall | SparseCall
    if op == "dense_rows":
        call = DenseCall(*arguments)
        served = call.teacher.dtype == student.dtype and not call.standardize and KINDS[call.kind] not in WITHOUT
        wide = call.teacher.shape[2]
    else:
        call = SparseCall(*arguments)
        served, wide = call.prototypes is None, call.vocab
    served = served and call.label_probs is None and not call.want_parts and wide >= student.shape[2]
    return served and _size_for(op, student) > 0


def _size_for(op: str, student: Tensor) -> int:
    assert student.device.index is not None
    return size_for(op, student.shape[2], student.dtype, student.device.index)


def dense_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(rows,) losses and (4, 0) parts of ``torch.ops.kdfast.dense_rows``' arguments; the gradient goes to ``grad``."""
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
    """The same of ``torch.ops.kdfast.sparse_rows``' arguments."""
    call = SparseCall(*arguments)
    coef, keep = call.coef.contiguous(), KINDS[call.kind] == "forward_kl"
    entries, size = (call.ids, call.weights, call.offsets, call.tail), _size_for("sparse_rows", student)
    loss = torch.ops.kdfast.sparse_rows_cluster(student, *entries, coef, call.label, call.smoothing, keep, grad, size)
    return loss, coef.new_empty(4, 0)
