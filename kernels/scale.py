"""``scale_``: a tensor times a factor that lies on the device."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.variant import Variant

__all__ = ["VARIANTS", "scale_"]

BLOCK = 2048


@triton.jit
def _scale(x, factor, count, BLOCK: tl.constexpr):
    f = tl.load(factor).to(tl.float32)
    # A loss is most often the last thing before backward(): its upstream gradient is 1, and nothing is read.
    count = tl.where(f == 1.0, 0, count)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * f
    tl.store(x + at, y.to(x.dtype.element_ty), mask=inside)


def _arguments(x: Tensor, factor: Tensor) -> dict[str, Any]:
    return {"x": x, "factor": factor, "count": x.numel(), "BLOCK": BLOCK}


def scale_(x: Tensor, factor: Tensor) -> None:
    """``x.mul_(factor)`` in place, without memory traffic where the factor is 1.

    Args:
        x: contiguous, of dtype bfloat16, float16 or float32.
        factor: one number of any floating-point dtype, on the device of ``x``.

    Raises:
        ValueError: several factors, or none.
    """
    if factor.numel() != 1:
        raise ValueError(f"factor must be one number, got {tuple(factor.shape)}")
    if x.numel():
        _scale[(triton.cdiv(x.numel(), BLOCK),)](**_arguments(x, factor))


VARIANTS = [
    Variant(
        f"{str(dtype)[6:]}{'' if count % 16 == 0 else '-odd'}",
        _scale,
        _arguments(torch.empty(count, dtype=dtype, device="meta"), torch.empty((), device="meta")),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for count in (1 << 32, (1 << 32) + 1)
]
