"""The one-read CUDA kernels as launchers of the row ops, and the table that says which rows they take.

They hold a row on the chip, shared out among the thread blocks of a cluster, and read it once. Whatever they do not
take runs the Triton kernels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import kdfast._C as _C
from kdfast._calls import DenseCall, SparseCall

__all__ = ["dense_rows", "is_built", "plan", "sparse_rows", "takes"]

KINDS: tuple[str, ...] = _C.divergences()
WITHOUT = ("dkd", "logit_mse")  # which need more than a row's sums
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITIES = ((9, 0), (10, 0), (10, 3))  # with clusters, and the shared memory for three blocks on a multiprocessor


@cache
def is_built() -> bool:
    """Whether this build has them: it was compiled with nvcc."""
    return hasattr(torch.ops.kdfast, "dense_rows_cluster")


@cache
def _runs_on(index: int) -> bool:
    return torch.cuda.get_device_capability(index) in CAPABILITIES


def plan(columns: int, dtype: torch.dtype, rows_held: int) -> int:
    """Thread blocks that share a row where the chip holds ``rows_held`` of this width; 0: these kernels do not."""
    size: int = _C.cluster_size(rows_held * columns * dtype.itemsize)
    return size


def takes(op: str, student: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Whether these kernels serve a call of ``dense_rows`` or ``sparse_rows``, or of its gradient forms."""
    if not (is_built() and student.dtype in DTYPES and _runs_on(student.device.index)):
        return False
    call: DenseCall | SparseCall
    if op == "dense_rows":
        call = DenseCall(*arguments)
        served = call.teacher.dtype == student.dtype and not call.standardize and KINDS[call.kind] not in WITHOUT
        wide, held = call.teacher.shape[2], 2
    else:
        call = SparseCall(*arguments)
        served, wide, held = call.shapes is None, call.vocab, 1
    served = served and call.label_probs is None and not call.want_parts and wide >= student.shape[2]
    return served and plan(student.shape[2], student.dtype, held) > 0


def dense_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(rows,) losses and (4, 0) parts of ``torch.ops.kdfast.dense_rows``' arguments; the gradient goes to ``grad``."""
    call = DenseCall(*arguments)
    coef = call.coef.contiguous()
    loss = torch.ops.kdfast.dense_rows_cluster(
        student, call.teacher, coef, call.label, call.smoothing, call.kind, call.a, call.b, call.scale, grad
    )
    return loss, coef.new_empty(4, 0)


def sparse_rows(student: Tensor, grad: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The same of ``torch.ops.kdfast.sparse_rows``' arguments."""
    call = SparseCall(*arguments)
    coef, keep = call.coef.contiguous(), KINDS[call.kind] == "forward_kl"
    entries = call.ids, call.weights, call.offsets, call.tail
    loss = torch.ops.kdfast.sparse_rows_cluster(student, *entries, coef, call.label, call.smoothing, keep, grad)
    return loss, coef.new_empty(4, 0)
