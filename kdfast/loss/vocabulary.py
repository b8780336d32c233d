"""Sums over the vocabulary: of rows that a process has whole, or of which each process of a group has some columns.

The oracle is written in them, so that one set of formulas serves both.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["WHOLE", "Shard", "Vocabulary"]


class Vocabulary:
    """Reductions of (rows, V) over the last dimension; column numbers are those of the whole vocabulary."""

    first = 0  # the number of the first column here
    columns: int | None = None  # of the whole vocabulary, where that is not what a row has

    def total(self, x: Tensor) -> Tensor:
        """The sum of the processes' partial sums ``x``."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x.sum(-1)

    def any(self, x: Tensor) -> Tensor:
        return x.any(-1)

    def max(self, x: Tensor) -> Tensor:
        return x.amax(-1)

    def argmax(self, x: Tensor) -> Tensor:
        return x.argmax(-1)

    def logsumexp(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x, -1)

    def log_softmax(self, x: Tensor) -> Tensor:
        return torch.log_softmax(x, -1)

    def pick(self, x: Tensor, column: Tensor) -> Tensor:
        """(rows,) the value of each row at the column of this number."""
        return x.gather(1, column[:, None])[:, 0]

    def mask(self, x: Tensor, column: Tensor) -> Tensor:
        """(rows, V) bool: true at the column of each row that has this number."""
        return torch.arange(self.first, self.first + x.shape[1], device=x.device) == column[:, None]


WHOLE = Vocabulary()


class Shard(Vocabulary):
    """Reductions of rows of which every process of a group has some columns, in the order of ranks.

    All processes must call the same ones.

    What they sum up is used by every one of them, so that its gradient is the sum of theirs: that of a loss which all
    compute comes out as often as there are processes.
    """

    columns: int

    def __init__(self, group: dist.ProcessGroup, width: int) -> None:
        widths = _widths(group, width)
        self.columns = sum(widths)
        self.group, self.width, self.widest = group, width, max(widths)
        self.first = sum(widths[: dist.get_rank(group)])

    def total(self, x: Tensor) -> Tensor:
        return _Total.apply(x, self.group)  # type: ignore[no-any-return, no-untyped-call]

    def sum(self, x: Tensor) -> Tensor:
        return self.total(x.sum(-1))

    def any(self, x: Tensor) -> Tensor:
        return self._largest(x.any(-1).to(torch.uint8)).bool()

    def max(self, x: Tensor) -> Tensor:
        x = x.detach()
        return self._largest(x.amax(-1) if self.width else x.new_full(x.shape[:-1], -math.inf))

    def argmax(self, x: Tensor) -> Tensor:
        x, most = x.detach(), self.max(x)
        here = torch.where(x == most[:, None], torch.arange(self.width, device=x.device) + self.first, self.columns)
        least = here.amin(-1) if self.width else here.new_full(here.shape[:-1], self.columns)
        return -self._largest(-least)

    def logsumexp(self, x: Tensor) -> Tensor:
        top = self.max(x)
        origin = torch.where(top == -math.inf, 0.0, top)
        return origin + self.sum((x - origin[:, None]).exp()).log()

    def log_softmax(self, x: Tensor) -> Tensor:
        return x - self.logsumexp(x)[:, None]

    def pick(self, x: Tensor, column: Tensor) -> Tensor:
        return self.sum(torch.where(self.mask(x, column), x, 0.0))

    def add_up(self, grad: Tensor) -> Tensor:
        """The sum of the processes' shares of a gradient, in float32 at least."""
        return _sum_over(grad.to(torch.promote_types(grad.dtype, torch.float32)), self.group).to(grad.dtype)

    def _largest(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _sum_over(grad, ctx.group), None


def _sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


# By group, while it is there: held any longer its threads would outlive it.
_known: WeakKeyDictionary[dist.ProcessGroup, dict[int, list[int]]] = WeakKeyDictionary()


def _widths(group: dist.ProcessGroup, width: int) -> list[int]:
    """The widths of all processes' shards, which are exchanged once: one changes only where all of them do."""
    known = _known.setdefault(group, {})
    if width not in known:
        widths: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(widths, width, group=group)
        known[width] = widths
    return known[width]
