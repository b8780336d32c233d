"""The one-read CUDA kernels as launchers of the row ops, and the table that says which rows they take.

They hold a row on the chip, shared out among the thread blocks of a cluster, and read it once. Whatever they do not
take runs the Triton kernels.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdfast._C as _C

__all__ = ["dense_rows", "dense_rows_grad", "dense_rows_inplace", "is_built", "plan", "sparse_rows"]
__all__ += ["sparse_rows_grad", "sparse_rows_inplace", "takes"]

KINDS: tuple[str, ...] = _C.divergences()
WITHOUT = ("dkd", "logit_mse")  # which need more than a row's sums
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITIES = ((9, 0), (10, 0), (10, 3))  # with clusters, and the shared memory for three blocks on a multiprocessor


class Dense(NamedTuple):
    """``dense_rows``' arguments after the student."""

    teacher: Tensor
    coef: Tensor
    label: Tensor | None
    label_probs: Tensor | None
    smoothing: float
    kind: int
    a: float
    b: float
    scale: float
    standardize: bool
    want_parts: bool


class Sparse(NamedTuple):
    """``sparse_rows``' arguments after the student."""

    ids: Tensor
    weights: Tensor
    offsets: Tensor
    tail: Tensor | None
    vocab: int
    shape: Tensor | None
    shapes: Tensor | None
    kind: int
    a: float
    b: float
    scale: float
    coef: Tensor
    label: Tensor | None
    label_probs: Tensor | None
    smoothing: float
    want_parts: bool


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
    call: Dense | Sparse
    if op == "dense_rows":
        call = Dense(*arguments)
        served = call.teacher.dtype == student.dtype and not call.standardize and KINDS[call.kind] not in WITHOUT
        wide, held = call.teacher.shape[2], 2
    else:
        call = Sparse(*arguments)
        served, wide, held = call.shapes is None, call.vocab, 1
    served = served and call.label_probs is None and not call.want_parts and wide >= student.shape[2]
    return served and plan(student.shape[2], student.dtype, held) > 0


def _dense(student: Tensor, grad: Tensor | None, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    call = Dense(*arguments)
    coef = call.coef.contiguous()
    loss = torch.ops.kdfast.dense_rows_cluster(
        student, call.teacher, coef, call.label, call.smoothing, call.kind, call.a, call.b, call.scale, grad
    )
    return loss, coef.new_empty(4, 0)


def _sparse(student: Tensor, grad: Tensor | None, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    call = Sparse(*arguments)
    coef, keep = call.coef.contiguous(), KINDS[call.kind] == "forward_kl"
    entries = call.ids, call.weights, call.offsets, call.tail
    loss = torch.ops.kdfast.sparse_rows_cluster(student, *entries, coef, call.label, call.smoothing, keep, grad)
    return loss, coef.new_empty(4, 0)


def _with_grad(launch: Any, student: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    loss, parts = launch(student, grad, arguments)
    return loss, grad, parts


def dense_rows(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(rows,) losses and (4, 0) parts of ``torch.ops.kdfast.dense_rows``' arguments."""
    return _dense(student, None, arguments)


def dense_rows_grad(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the gradient of the losses' sum between them."""
    return _with_grad(_dense, student, arguments)


def dense_rows_inplace(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The same with the gradient in the student's own memory."""
    return _dense(student, student, arguments)


def sparse_rows(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """(rows,) losses and (4, 0) parts of ``torch.ops.kdfast.sparse_rows``' arguments."""
    return _sparse(student, None, arguments)


def sparse_rows_grad(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the gradient of the losses' sum between them."""
    return _with_grad(_sparse, student, arguments)


def sparse_rows_inplace(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The same with the gradient in the student's own memory."""
    return _sparse(student, student, arguments)
