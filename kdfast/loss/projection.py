"""An output layer's matrix products over a chunk of rows: hidden states to logits, and their gradient back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kdfast.labels.head import OutputLayer

__all__ = ["WeightGrad", "multiply_out", "slope_of_cap", "without_autocast"]

# Rows of a narrow weight that are made wide at a time, where no product of narrow numbers gives wide ones.
WIDENED = 4096


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products are of the dtypes that they are given."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def multiply_out(layer: OutputLayer, hidden: Tensor, out: Tensor) -> None:
    """Write (rows, V) logits into ``out``, in whose dtype products are summed: it may be wider than the weight's."""
    _products(hidden, layer.weight, out)
    if layer.bias is not None:
        out += layer.bias
    if layer.scale != 1.0:
        out *= layer.scale
    if layer.softcap is not None:
        out.div_(layer.softcap).tanh_().mul_(layer.softcap)


def slope_of_cap(logits: Tensor, softcap: float, out: Tensor) -> None:
    """Write the derivative of ``softcap * tanh(x / softcap)`` into ``out``, given its (rows, V) values."""
    torch.div(logits, softcap, out=out)
    out.square_().neg_().add_(1.0)


def _products(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif weight.is_cuda and hidden.dtype == weight.dtype:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for first in range(0, weight.shape[0], WIDENED):
            block = weight[first : first + WIDENED].to(out.dtype)
            torch.mm(wide, block.T, out=out[:, first : first + WIDENED])


class WeightGrad:
    """The gradient of a weight, summed over chunks of rows: in float32 if there are several.

    Args:
        weight: (V, d).
        chunks: how many there will be.
        into: the caller's own (V, d) float32 or float64 gradient, which the sum is added to.
    """

    def __init__(self, weight: Tensor, chunks: int, into: Tensor | None = None) -> None:
        self._dtype = weight.dtype
        self._into = into
        self._sum = into
        if into is None and chunks != 1:
            wide = torch.promote_types(weight.dtype, torch.float32)
            self._sum = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        """Add ``grad.T @ hidden`` of a chunk: (rows, V) and (rows, d) of the weight's dtype."""
        if self._sum is None:
            self._sum = grad.T @ hidden
        elif self._sum.dtype == grad.dtype:
            self._sum.addmm_(grad.T, hidden)
        elif grad.is_cuda:
            torch.addmm(self._sum, grad.T, hidden, out_dtype=self._sum.dtype, out=self._sum)
        else:
            for first in range(0, grad.shape[1], WIDENED):
                self._sum[first : first + WIDENED] += grad[:, first : first + WIDENED].T @ hidden

    def take(self) -> Tensor | None:
        """The sum in the weight's dtype; None where it was added to the caller's own gradient."""
        if self._into is not None or self._sum is None:
            return None
        return self._sum.to(self._dtype)
