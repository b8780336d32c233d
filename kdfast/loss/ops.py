"""Fake kernels, autograd and device fallbacks of every native op: the one file that knows which kernel runs where.

An op takes (outer, inner, V) rows of unit vocabulary stride and ``coef`` (5, rows) as ``kdfast.loss.reference``
describes. C++ registers the schema and the CPU kernel, and this file what runs on CUDA: the one-read kernels or
Triton's. Devices without a kernel run the reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdfast._C as _C
from kdfast import _triton
from kdfast._calls import DenseCall, SparseCall
from kdfast.divergences import Divergence
from kdfast.kernels import cluster
from kdfast.loss import reference

__all__ = ["DenseTeacher", "SparseTeacher", "TailPrototypes", "Teacher", "Truth", "row_loss", "row_loss_fused"]
__all__ += ["row_loss_inplace", "scaled_once"]

_KINDS: tuple[str, ...] = _C.divergences()


class Truth(NamedTuple):
    """Labels as the ops take them, and whether the parts are wanted."""

    target: Tensor | None  # (rows,) int64
    probs: Tensor | None  # (outer, inner, V_s)
    smoothing: float
    want_parts: bool


class DenseTeacher(NamedTuple):
    logits: Tensor  # (outer, inner, V_t)
    divergence: Divergence
    op: str = "dense_rows"

    def arguments(self, coef: Tensor, truth: Truth) -> tuple[Any, ...]:
        numbers = _numbers(self.divergence)
        return (self.logits, coef, *truth[:3], *numbers, self.divergence.standardize, truth.want_parts)


class TailPrototypes(NamedTuple):
    """What the tail of every row looks like, and the divergence from the whole distribution that this makes."""

    prototype_ids: Tensor  # (rows,) int64
    prototypes: Tensor  # (S, vocab)
    divergence: Divergence


class SparseTeacher(NamedTuple):
    ids: Tensor  # (nnz,) int32
    weights: Tensor  # (nnz,) float32
    offsets: Tensor  # (rows + 1,) int64
    tail: Tensor | None  # (rows,) log-mass
    vocab: int
    subtract_entropy: bool  # without prototypes: forward KL rather than soft cross-entropy
    tail_prototypes: TailPrototypes | None = None
    op: str = "sparse_rows"

    def arguments(self, coef: Tensor, truth: Truth) -> tuple[Any, ...]:
        div = Divergence.of("forward_kl" if self.subtract_entropy else "soft_ce")
        prototype_ids = prototypes = None
        if self.tail_prototypes is not None:
            prototype_ids, prototypes, div = self.tail_prototypes
        return (*self[:5], prototype_ids, prototypes, *_numbers(div), coef, *truth)


Teacher = DenseTeacher | SparseTeacher


def _numbers(divergence: Divergence) -> tuple[int, float, float, float]:
    """A divergence as the ops take it: its kind, its two parameters and a factor."""
    div = divergence.canonical()
    return _KINDS.index(div.name), div.a, div.b, 1.0 / (div.a * (1.0 - div.a)) if div.normalize else 1.0


def _divergence(kind: int, a: float, b: float, scale: float, standardize: bool = False) -> Divergence:
    return Divergence(_KINDS[kind], a=a, b=b, normalize=scale != 1.0, standardize=standardize)


# ---- what the losses call -------------------------------------------------------------------------------------------


def row_loss(student: Tensor, teacher: Teacher, coef: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
    """(rows,) losses and (4, rows) parts; the backward pass computes the gradient anew."""
    return _op(teacher.op)(student, *teacher.arguments(coef, truth))


def row_loss_fused(student: Tensor, teacher: Teacher, coef: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
    """Their sum; the forward pass computes the gradient too, and backward only scales it."""
    return _Fused.apply(  # type: ignore[no-untyped-call]
        student, teacher.op + "_grad", *teacher.arguments(coef, truth)
    )


def row_loss_inplace(student: Tensor, teacher: Teacher, coef: Tensor, truth: Truth) -> tuple[Tensor, Tensor]:
    """The same, with the gradient written over the student's logits."""
    return _InPlace.apply(  # type: ignore[no-untyped-call]
        student, teacher.op + "_inplace", *teacher.arguments(coef, truth)
    )


def _op(name: str) -> Any:
    return getattr(torch.ops.kdfast, name).default


# ---- gradient in the forward pass -----------------------------------------------------------------------------------

_SPENT = (
    "the gradient that kd_loss computed in its forward pass has been used by an earlier backward; "
    'for several backward passes through one loss use backward="recompute"'
)
_ONCE = "kd_loss is once differentiable: its gradient has no derivative of its own"


class _Once(torch.autograd.Function):
    """Its input, with a derivative that says that there is none."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_ONCE)


def scaled_once(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The saved gradients times the upstream scalar, each in its own memory."""
    if not torch.compiler.is_compiling():
        if getattr(ctx, "spent", False):
            raise RuntimeError(_SPENT)
        ctx.spent = True
    return tuple(None if grad is None else _scaled(grad, upstream) for grad in ctx.saved_tensors)


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    with torch.no_grad():
        _op("scale_")(grad, upstream)
    if torch.is_grad_enabled():  # create_graph=True
        grad = _Once.apply(grad, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return grad


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, op: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, grad, parts = _op(op)(student, *arguments)
        return _save_for_backward(ctx, arguments, grad, loss, parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return *scaled_once(ctx, upstream), *(None,) * ctx.others


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, op: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, parts = _op(op)(student, *arguments)
        torch.autograd.graph.increment_version(student)
        return _save_for_backward(ctx, arguments, student, loss, parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return *scaled_once(ctx, upstream), *(None,) * ctx.others


def _save_for_backward(
    ctx: Any, arguments: tuple[Any, ...], grad: Tensor, loss: Tensor, parts: Tensor
) -> tuple[Tensor, Tensor]:
    ctx.save_for_backward(grad)
    ctx.mark_non_differentiable(parts)
    ctx.others = 1 + len(arguments)
    return loss.sum(), parts


# ---- registration ---------------------------------------------------------------------------------------------------

# Where coef lies among an op's arguments after the student.
_COEF = {"dense_rows": DenseCall._fields.index("coef"), "sparse_rows": SparseCall._fields.index("coef")}


def _fake_outputs(coef: Tensor, want_parts: bool) -> tuple[Tensor, Tensor]:
    rows = coef.shape[1]
    return coef.new_empty(rows), coef.new_empty(4, rows if want_parts else 0)


# What Triton's kernels read; float64 is the reference's.
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# KDFAST_GPU forces the kernels that a test or a benchmark is about: `once` is Triton's, with clusters of thread blocks
# that hold the rows which fit.
_GPU_KERNELS = ("cluster", "triton", "once", "reference")


def _gpu_kernels(name: str, student: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The launchers that serve a call on a GPU, the fastest first; None: the reference does."""
    wanted = os.environ.get("KDFAST_GPU")
    if wanted is not None and wanted not in _GPU_KERNELS:
        raise ValueError(f"KDFAST_GPU must be one of {', '.join(_GPU_KERNELS)}, got {wanted!r}")
    if wanted in (None, "cluster") and cluster.supports(name, student, arguments):
        return cluster
    if wanted == "cluster":
        raise ValueError(f"KDFAST_GPU=cluster: the one-read kernels do not take this call of {name}")
    numbers = [x for x in (student, *arguments) if isinstance(x, Tensor) and x.is_floating_point()]
    served = wanted != "reference" and all(x.dtype in _GPU_DTYPES for x in numbers)
    return _triton.launchers(name.removesuffix("_rows")) if served else None


def _form(launch: Callable[..., tuple[Tensor, Tensor]], suffix: str) -> Callable[..., Any]:
    """One form of an op from its kernels' launcher, which takes where the gradient goes after the student."""

    def run(student: Tensor, *arguments: Any) -> Any:
        if suffix == "_grad":
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
            loss, parts = launch(student, grad, *arguments)
            return loss, grad, parts
        return launch(student, student if suffix == "_inplace" else None, *arguments)

    return run


def _on_gpu(name: str, suffix: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """A row op's CUDA kernel, or the reference for what none serves."""

    def run(student: Tensor, *arguments: Any) -> Any:
        kernels = _gpu_kernels(name, student, arguments)
        form = fallback if kernels is None else _form(getattr(kernels, name), suffix)
        return form(student, *arguments)

    return run


def _register(name: str, fallback: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Fakes, autograd and the reference fallback of one row op and its two gradient forms."""
    at = _COEF[name]

    def fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        return _fake_outputs(arguments[at], arguments[-1])

    def fake_grad(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, parts = fake(student, *arguments)
        return loss, torch.empty_like(student, memory_format=torch.contiguous_format), parts

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
        none = (None,) * (len(ctx.rest) - 1)
        if upstream is None:
            return None, *none
        inputs = list(ctx.rest)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[i] = tensor
        coef = inputs[1 + at]
        # A row's upstream gradient scales its coefficients, unless it is infinite and they are 0; temperatures stay.
        inputs[1 + at] = torch.cat([coef[:2], torch.where(coef[2:] == 0.0, 0.0, coef[2:] * upstream)])
        inputs[-1] = False
        return _op(name + "_grad")(*inputs)[1], *none

    def backward_of_grad(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_ONCE)

    def fallback_grad(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Not autograd: an op's kernel runs below it, where it records nothing.
        loss, backward, parts = torch.func.vjp(lambda x: fallback(x, *arguments), student, has_aux=True)  # type: ignore[misc]
        (grad,) = backward(torch.ones_like(loss))
        return loss, grad.contiguous(), parts

    def fallback_inplace(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        loss, grad, parts = fallback_grad(student, *arguments)
        student.copy_(grad)
        return loss, parts

    library = torch.library
    for suffix, make_fake, implementation in (
        ("", fake, fallback),
        ("_grad", fake_grad, fallback_grad),
        ("_inplace", fake, fallback_inplace),
    ):
        library.register_fake(f"kdfast::{name}{suffix}", make_fake)
        library.impl(f"kdfast::{name}{suffix}", "default", implementation)
        library.impl(f"kdfast::{name}{suffix}", "cuda", _on_gpu(name, suffix, implementation))
    library.register_autograd(f"kdfast::{name}", backward, setup_context=setup_context)
    library.register_autograd(f"kdfast::{name}_grad", backward_of_grad)


def _reference_dense(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = DenseCall(*arguments)
    divergence = _divergence(call.kind, call.a, call.b, call.scale, call.standardize)
    labels = reference.Labels(call.label, _flat(call.label_probs), call.smoothing)
    loss, parts = reference.dense_rows(_rows(student), _rows(call.teacher), call.coef, labels, divergence)
    return loss, _stack(parts, call.want_parts)


def _reference_sparse(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = SparseCall(*arguments)
    labels = reference.Labels(call.label, _flat(call.label_probs), call.smoothing)
    entries, divergence = call[:3], _divergence(call.kind, call.a, call.b, call.scale)
    if call.prototype_ids is not None and call.prototypes is not None and call.tail is not None:
        tail_prototypes = reference.TailPrototypes(call.prototype_ids, call.prototypes)
        loss, parts = reference.prototype_rows(
            _rows(student), *entries, call.tail, tail_prototypes, call.coef, labels, divergence
        )
    else:
        keep = divergence.name == "forward_kl"
        loss, parts = reference.sparse_rows(
            _rows(student), *entries, call.tail, call.vocab, call.coef, labels, subtract_entropy=keep
        )
    return loss, _stack(parts, call.want_parts)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x)


def _stack(parts: reference.Parts, want_parts: bool) -> Tensor:
    stacked = torch.stack(parts)
    return stacked if want_parts else stacked[:, :0].contiguous()


_register("dense_rows", _reference_dense)
_register("sparse_rows", _reference_sparse)


@torch.library.register_fake("kdfast::scale_")
def _(x: Tensor, factor: Tensor) -> None:
    return None


@torch.library.impl("kdfast::scale_", "default")
def _(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor)


@torch.library.impl("kdfast::scale_", "cuda")
def _(x: Tensor, factor: Tensor) -> None:
    kernels = _triton.launchers("scale") if x.dtype in _GPU_DTYPES and x.is_contiguous() else None
    if kernels is None:
        x.mul_(factor)
    else:
        kernels.scale_(x, factor)
