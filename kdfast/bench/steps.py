"""A training step of a loss, as a benchmark's contenders take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Contenders", "Run", "compiled", "step"]

# Returns what it computes, which a test compares and a benchmark drops.
Run = Callable[[], Any]
# Each is made on its own, since some cannot be.
Contenders = dict[str, Callable[[], Run]]


class _Computed(torch.autograd.Function):
    """What a model has computed, and a loss may write over, for nothing: the tensor itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def step(loss: Callable[..., Tensor], *leaves: Tensor, inplace: bool = False) -> Run:
    """Loss and gradients; the gradients are dropped, as a training step that has used them would."""
    leaves = tuple(x.requires_grad_() for x in leaves)

    def run() -> tuple[Tensor, ...]:
        inputs = tuple(map(_Computed.apply, leaves)) if inplace else leaves
        value = loss(*inputs)
        return value, *torch.autograd.grad(value, inputs)

    return run


def compiled(make: Callable[[Any], Run], loss: Any) -> Callable[[], Run]:
    """Makes a step of what ``torch.compile`` makes of the loss."""

    def run() -> Run:
        torch.compiler.reset()
        return make(torch.compile(loss))

    return run
