"""What the kernels that choose columns share: a row's place, and its one full sweep."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.variant import Variant

__all__ = [
    "BLOCK",
    "LOWEST",
    "WARPS",
    "Rows",
    "load_tile",
    "row_variants",
    "start_of_row",
    "weigh",
    "weigh_tile",
]

BLOCK = 2048  # columns of a tile
WARPS = 8
# Below every logit, and finite: where a sweep begins, so that a tile of -inf adds 0 like any other.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def start_of_row(logits, row, inner, outer_stride, inner_stride):
    """Where a row of (outer, inner, columns) begins."""
    return logits + (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def load_tile(logits, at, columns):
    return tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)


@triton.jit
def weigh_tile(x, top, sums, bits):
    """The largest logit so far, and the lanes' sums of ``exp2((x - largest) * bits)``, with a tile more in both."""
    higher = tl.maximum(top, tl.max(x, 0))
    return higher, sums * tl.exp2((top - higher) * bits) + tl.exp2((x - higher) * bits)


@triton.jit
def weigh(logits, columns, bits, BLOCK: tl.constexpr):
    """The largest logit, and the sum of all ``exp2((x - largest) * bits)``: NaN in a bad row, 0 in an empty one."""
    top, sums = tl.full([], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        x = load_tile(logits, begin + tl.arange(0, BLOCK), columns)
        top, sums = weigh_tile(x, top, sums, bits)
    return top, tl.sum(sums, 0)


class Rows:
    """(outer, inner, columns) logits of unit stride along the columns, as the kernels take them."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.logits = logits
        self.count, self.columns = logits.shape[0] * logits.shape[1], logits.shape[2]
        # Within what a float32 can bear; temperatures beyond are as good as 0 and infinite.
        self.inverse = min(max(1.0 / temperature, 1e-35), 1e35)

    @property
    def place(self) -> tuple[Any, ...]:
        """The kernels' first arguments."""
        logits = self.logits
        return logits, logits.shape[1], logits.stride(0), logits.stride(1), self.columns

    @property
    def bits(self) -> float:
        """What makes a logit an exponent of 2."""
        return self.inverse / math.log(2.0)

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.logits.device)


def row_variants(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    name: str = "",
    warps: int = WARPS,
    gathers: bool = False,
) -> list[Variant]:
    """A kernel over rows for every dtype of logits, with rows that are aligned and with others."""
    place = {"inner": "i32", "outer_stride": "i64", "inner_stride": "i64", "columns": "i32"}
    pointers = tuple(name for name, type in types.items() if type.startswith("*"))
    return [
        Variant(
            f"{name}{dtype}{'' if aligned else '-odd'}",
            kernel,
            {"logits": f"*{dtype}", **place, **types},
            constants,
            aligned=("logits", *pointers, *aligned),
            warps=warps,
            gathers=gathers,
        )
        for dtype in ("bf16", "fp16", "fp32")
        for aligned in (("outer_stride", "inner_stride", "columns"), ())
    ]
