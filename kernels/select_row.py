"""What the kernels that choose columns share: a row's place, and its one full sweep."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.launch import check_rows

__all__ = ["BLOCK", "LOWEST", "WARPS", "Logits", "forms", "load_tile", "start_of_row", "weigh", "weigh_tile"]

BLOCK = 2048  # columns of a tile
WARPS = 8
# Below every logit, and finite: where a sweep begins, so that a tile of -inf adds 0 like any other.
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Logits(NamedTuple):
    """A kernel's argument: (outer, inner, columns) logits of unit stride along the columns, and their temperature."""

    data: tl.tensor
    outer_stride: tl.tensor
    inner_stride: tl.tensor
    inner: tl.tensor
    columns: tl.tensor
    scale_log2: tl.tensor  # log2(e) / temperature: what makes a logit an exponent of 2
    inverse_tau: tl.tensor

    @classmethod
    def of(cls, logits: Tensor, temperature: float) -> Logits:
        """The argument of a launch. Raise ``ValueError`` for logits that do not lie along the columns."""
        check_rows(logits=logits)
        # Within what a float32 can bear; temperatures beyond are as good as 0 and infinite.
        inverse_tau = min(max(1.0 / temperature, 1e-35), 1e35)
        _, inner, columns = logits.shape
        outer_stride, inner_stride, _ = logits.stride()
        return cls(logits, outer_stride, inner_stride, inner, columns, inverse_tau / math.log(2.0), inverse_tau)


@triton.jit
def start_of_row(logits, row):
    """Where a row begins."""
    outer, inner = (row // logits.inner).to(tl.int64), (row % logits.inner).to(tl.int64)
    return logits.data + outer * logits.outer_stride + inner * logits.inner_stride


@triton.jit
def load_tile(row, at, columns):
    return tl.load(row + at, mask=at < columns, other=float("-inf")).to(tl.float32)


@triton.jit
def weigh_tile(x, row_max, sums, scale_log2):
    """(largest logit so far, the lanes' sums of ``exp2((x - largest) * scale_log2)``) with a tile more in both."""
    raised = tl.maximum(row_max, tl.max(x, 0))
    return raised, sums * tl.exp2((row_max - raised) * scale_log2) + tl.exp2((x - raised) * scale_log2)


@triton.jit
def weigh(row, columns, scale_log2, BLOCK: tl.constexpr):
    """(largest logit, sum of all ``exp2((x - largest) * scale_log2)``): NaN in a bad row, 0 in an empty one."""
    row_max, sums = tl.full([], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        x = load_tile(row, begin + tl.arange(0, BLOCK), columns)
        row_max, sums = weigh_tile(x, row_max, sums, scale_log2)
    return row_max, tl.sum(sums, 0)


def forms() -> dict[str, Tensor]:
    """Logits on no device, for every dtype, with rows that are aligned and others, by the name of their form."""
    return {
        f"{str(dtype)[6:]}{'-odd' if odd else ''}": torch.empty_strided(
            (2, 2, 128256 + odd), ((1 << 33) + odd, (1 << 32) + odd, 1), dtype=dtype, device="meta"
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for odd in (0, 1)
    }
