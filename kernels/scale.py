"""``scale_``: a tensor times a factor that lies on the device."""

from __future__ import annotations

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


def scale_(x: Tensor, factor: Tensor) -> None:
    """``x.mul_(factor)`` for a contiguous ``x`` and one number ``factor``; a factor of 1 costs no memory traffic."""
    if x.numel():
        _scale[(triton.cdiv(x.numel(), BLOCK),)](x, factor, x.numel(), BLOCK=BLOCK)


VARIANTS = [
    Variant(
        f"{dtype}{'' if aligned else '-odd'}",
        _scale,
        {"x": f"*{dtype}", "factor": "*fp32", "count": "i64"},
        {"BLOCK": BLOCK},
        aligned=("x", "factor", *aligned),
    )
    for dtype in ("bf16", "fp16", "fp32")
    for aligned in (("count",), ())
]
