"""Derivatives beyond the first gradient: errors that autograd cannot miss, and when the oracle must serve.

A hand-written gradient is a number to PyTorch, not a function: whatever asks for its derivative finds none, and takes
it for zero. So the gradient is tied to the graph that it came from by a node that raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["ONCE", "is_batched", "once", "refuse_batched", "refuse_tangents", "saveable", "transformed"]

ONCE = (
    "kd_loss is once differentiable: its gradient has no derivative of its own. For second derivatives, as of "
    'Hessians, gradient penalties and inner steps, use backward="eager"'
)

_NO_TANGENT = (
    "{name} has no forward-mode derivative, and would take a tangent for zero. For forward mode (torch.func.jvp, "
    'jacfwd, dual numbers) use kd_loss with backward="eager"'
)


class _Once(torch.autograd.Function):
    """The identity of ``count`` gradients, whose derivative says that there is none."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ONCE)


def once(grads: Iterable[Tensor | None], *anchors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``grads`` as a backward pass gives them, none of which has a derivative.

    With ``create_graph=True`` they are tied to ``anchors``, by which autograd comes from them to what they depend on:
    the loss or the inputs, as ``ctx.saved_tensors`` gives them, and the upstream gradient. It meets the error there.

    Raises:
        NotImplementedError: with ``create_graph=True`` inside a transform of ``torch.func``.
    """
    grads = tuple(grads)
    if not torch.is_grad_enabled():
        return grads
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(ONCE)
    there = [grad for grad in grads if grad is not None]
    tied = iter(_Once.apply(len(there), *there, *anchors))  # type: ignore[no-untyped-call]
    return tuple(None if grad is None else next(tied) for grad in grads)


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is on, which only PyTorch's own operations serve."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` is many tensors for one, as a backward pass with ``is_grads_batched=True`` is given."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def refuse_batched(x: Tensor) -> None:
    """Raise ``NotImplementedError`` for an upstream gradient that is many for one, where chunks are taken in place."""
    if is_batched(x):
        raise NotImplementedError(
            'a loss of a Head that multiplies its logits out again takes no is_grads_batched=True: use backward="eager"'
        )


def refuse_tangents(name: str, arguments: Iterable[Any]) -> None:
    """Raise ``NotImplementedError`` if an argument of the op ``name`` carries a tangent: it would be lost."""
    for x in arguments:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(_NO_TANGENT.format(name=name))


def saveable(x: Tensor) -> Tensor:
    """``x``, or a copy of a tensor of ``torch.inference_mode()``: autograd could not see it change, and keeps none."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x
