"""The row ops by name, and what runs them where: the one file that knows which kernel a device has.

An op takes (outer, inner, V) rows of unit vocabulary stride and ``coef`` (5, rows) as ``kdfast.loss.reference``
describes. C++ registers the schema and the CPU kernel, and this file what runs on CUDA: the one-read kernels or
Triton's. Devices without a kernel run the reference. Fake kernels and the ops' own autograd are here, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

import kdfast._C as _C  # noqa: F401  (registers the schemas)
from kdfast import _triton
from kdfast._calls import DenseCall, SparseCall
from kdfast.kernels import cluster
from kdfast.loss import reference
from kdfast.loss.derivatives import ONCE, refuse_tangents, saveable
from kdfast.loss.reference import BY_INDEX, Selection

__all__ = [
    "DENSE_ROWS",
    "LIBRARY",
    "SCALE_",
    "SPARSE_ROWS",
    "Op",
    "RowOps",
    "reference_dense",
    "reference_sparse",
    "scaled_coefficients",
]

Op = Any  # an OpOverload, or a function that is registered as one


class RowOps(NamedTuple):
    """The three forms of a row op. All take the student's logits and the same ``DenseCall`` or ``SparseCall``."""

    losses: Op  # (rows,) losses and (4, rows) parts, (4, 0) unless they are wanted; differentiable
    grad: Op  # (rows,) losses, the gradient of their sum, and parts
    inplace: Op  # (rows,) losses and parts; the gradient is written over the student's logits


DENSE_ROWS = RowOps(
    losses=torch.ops.kdfast.dense_rows.default,
    grad=torch.ops.kdfast.dense_rows_grad.default,
    inplace=torch.ops.kdfast.dense_rows_inplace.default,
)
SPARSE_ROWS = RowOps(
    losses=torch.ops.kdfast.sparse_rows.default,
    grad=torch.ops.kdfast.sparse_rows_grad.default,
    inplace=torch.ops.kdfast.sparse_rows_inplace.default,
)
SCALE_ = torch.ops.kdfast.scale_.default


def scaled_coefficients(coef: Tensor, upstream: Tensor) -> Tensor:
    """``coef`` of losses that are multiplied by ``upstream``, one number or one per row. Temperatures stay.

    A coefficient of 0 stays 0 where upstream is infinite.
    """
    return torch.cat([coef[:2], torch.where(coef[2:] == 0.0, 0.0, coef[2:] * upstream)])


# ---- the kernels of a GPU -------------------------------------------------------------------------------------------

# A launcher takes the student, where the gradient goes or None, and an op's other arguments. It gives losses and parts.
Launcher = Callable[..., tuple[Tensor, Tensor]]

ONE_READ = {"dense_rows": cluster.dense_rows, "sparse_rows": cluster.sparse_rows}

# What Triton's kernels read; float64 is the reference's.
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# KDFAST_GPU forces the kernels that a test or a benchmark is about: `once` is Triton's, with clusters of thread blocks
# that hold the rows which fit.
GPU_KERNELS = ("cluster", "triton", "once", "reference")


def gpu_launcher(name: str, student: Tensor, arguments: tuple[Any, ...]) -> Launcher | None:
    """The fastest launcher that serves a call of ``dense_rows`` or ``sparse_rows`` on a GPU; None: the reference does.

    Raises:
        ValueError: KDFAST_GPU names no kernels, or the one-read kernels for a call that they do not take.
    """
    wanted = os.environ.get("KDFAST_GPU")
    if wanted is not None and wanted not in GPU_KERNELS:
        raise ValueError(f"KDFAST_GPU must be one of {', '.join(GPU_KERNELS)}, got {wanted!r}")
    if wanted in (None, "cluster") and cluster.supports(name, student, arguments):
        return ONE_READ[name]
    if wanted == "cluster":
        raise ValueError(f"KDFAST_GPU=cluster: the one-read kernels do not take this call of {name}")
    numbers = [x for x in (student, *arguments) if isinstance(x, Tensor) and x.is_floating_point()]
    served = wanted != "reference" and all(x.dtype in GPU_DTYPES for x in numbers)
    return _triton.launcher(name) if served else None


def forms_of(launch: Launcher) -> RowOps:
    """The three forms of a row op by one launcher."""

    def losses(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return launch(student, None, *arguments)

    def grad(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
        loss, parts = launch(student, out, *arguments)
        return loss, out, parts

    def inplace(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return launch(student, student, *arguments)

    return RowOps(losses, grad, inplace)


def on_gpu(name: str, fallback: RowOps) -> RowOps:
    """The three forms of a row op by whichever launcher serves a call, or by ``fallback``."""

    def forms(student: Tensor, arguments: tuple[Any, ...]) -> RowOps:
        launch = gpu_launcher(name, student, arguments)
        return fallback if launch is None else forms_of(launch)

    def losses(student: Tensor, *arguments: Any) -> Any:
        return forms(student, arguments).losses(student, *arguments)

    def grad(student: Tensor, *arguments: Any) -> Any:
        return forms(student, arguments).grad(student, *arguments)

    def inplace(student: Tensor, *arguments: Any) -> Any:
        return forms(student, arguments).inplace(student, *arguments)

    return RowOps(losses, grad, inplace)


# ---- the reference, for devices without a kernel --------------------------------------------------------------------


def reference_dense(student: Tensor, *arguments: Any, select: Selection = BY_INDEX) -> tuple[Tensor, Tensor]:
    """``dense_rows`` by the reference, which autograd sees through."""
    call = DenseCall(*arguments)
    loss, parts = reference.dense_rows(
        student=_rows(student),
        teacher=_rows(call.teacher),
        coef=call.coef,
        targets=_targets(call),
        divergence=call.divergence,
        select=select,
    )
    return loss, _stack(parts, call.want_parts)


def reference_sparse(student: Tensor, *arguments: Any, select: Selection = BY_INDEX) -> tuple[Tensor, Tensor]:
    """``sparse_rows`` by the reference, which autograd sees through."""
    call = SparseCall(*arguments)
    tail_prototypes = None
    if call.prototype_ids is not None and call.prototypes is not None:
        tail_prototypes = reference.TailPrototypes(call.prototype_ids, call.prototypes)
    loss, parts = reference.sparse_rows(
        student=_rows(student),
        ids=call.ids,
        weights=call.weights,
        offsets=call.offsets,
        tail=call.tail,
        vocab=call.vocab,
        tail_prototypes=tail_prototypes,
        coef=call.coef,
        targets=_targets(call),
        divergence=call.divergence,
        select=select,
    )
    return loss, _stack(parts, call.want_parts)


def _targets(call: DenseCall | SparseCall) -> reference.Targets:
    return reference.Targets(call.label, None if call.label_probs is None else _rows(call.label_probs), call.smoothing)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _stack(parts: reference.Parts, want_parts: bool) -> Tensor:
    stacked = torch.stack(parts)
    return stacked if want_parts else stacked[:, :0].contiguous()


def _slow_forms(losses: Callable[..., tuple[Tensor, Tensor]]) -> RowOps:
    """The three forms of a row op by PyTorch's differentiation of its losses."""

    def grad(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Not autograd: an op's kernel runs below it, where it records nothing.
        loss, backward, parts = torch.func.vjp(lambda x: losses(x, *arguments), student, has_aux=True)  # type: ignore[misc]
        (gradient,) = backward(torch.ones_like(loss))
        return loss, gradient.contiguous(), parts

    def inplace(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, gradient, parts = grad(student, *arguments)
        student.copy_(gradient)
        return loss, parts

    return RowOps(losses, grad, inplace)


# ---- registration ---------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("kdfast", "FRAGMENT")  # type: ignore[no-untyped-call]


def _fakes(of: type[DenseCall | SparseCall]) -> RowOps:
    """Shapes and dtypes of what the three forms give."""

    def losses(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        call = of(*arguments)
        rows = call.coef.shape[1]
        return call.coef.new_empty(rows), call.coef.new_empty(4, rows if call.want_parts else 0)

    def grad(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, parts = losses(student, *arguments)
        return loss, torch.empty_like(student, memory_format=torch.contiguous_format), parts

    return RowOps(losses, grad, losses)


def _register_autograd(ops: RowOps, of: type[DenseCall | SparseCall]) -> None:
    """The losses' backward pass computes the gradient anew; the gradient has none."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(saveable(inputs[i]) for i in ctx.tensors))
        ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
        none = (None,) * (len(ctx.rest) - 1)
        if upstream is None:
            return None, *none
        inputs = list(ctx.rest)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[i] = tensor
        student, call = inputs[0], of(*inputs[1:])
        call = call._replace(coef=scaled_coefficients(call.coef, upstream), want_parts=False)
        return ops.grad(student, *call)[1], *none

    def backward_of_grad(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ONCE)

    _on_autograd(ops.losses, make_autograd_impl(ops.losses, Info(backward, setup_context)))
    _on_autograd(ops.grad, make_autograd_impl(ops.grad, Info(backward_of_grad, None)))
    _on_autograd(ops.inplace, _below_autograd(ops.inplace))


def _on_autograd(op: Op, kernel: Callable[..., Any]) -> None:
    """Register what autograd runs. ``torch.library.register_autograd`` alone drops forward mode's tangents unsaid."""

    def checked(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_tangents(op.name(), arguments)
        return kernel(keyset, *arguments)

    LIBRARY.impl(op.name(), checked, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def _below_autograd(op: Op) -> Callable[..., Any]:
    """An op that has no derivative."""

    def kernel(keyset: Any, student: Tensor, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and student.requires_grad:
            raise NotImplementedError(f'{op.name()} has no derivative: use kd_loss with backward="inplace"')
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, student, *arguments)

    return kernel


def _register(name: str, ops: RowOps, of: type[DenseCall | SparseCall], slow: RowOps) -> None:
    """Fakes, autograd, the kernels of a GPU and the reference fallback of one row op."""
    for op, fake, fallback, fast in zip(ops, _fakes(of), slow, on_gpu(name, slow), strict=True):
        torch.library.register_fake(op, fake)
        torch.library.impl(op.name(), "default", fallback)
        torch.library.impl(op.name(), "cuda", fast)
    _register_autograd(ops, of)


_register("dense_rows", DENSE_ROWS, DenseCall, _slow_forms(reference_dense))
_register("sparse_rows", SPARSE_ROWS, SparseCall, _slow_forms(reference_sparse))


@torch.library.register_fake("kdfast::scale_")
def _(x: Tensor, factor: Tensor) -> None:
    return None


@torch.library.impl("kdfast::scale_", "default")
def _(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor)


@torch.library.impl("kdfast::scale_", "cuda")
def _(x: Tensor, factor: Tensor) -> None:
    launch = _triton.launcher("scale_") if x.dtype in GPU_DTYPES and x.is_contiguous() else None
    if launch is None:
        x.mul_(factor)
    else:
        launch(x, factor)
