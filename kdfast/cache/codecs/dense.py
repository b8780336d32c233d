"""``dense``: every column in 8 bits, for small vocabularies (classification)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import FixedWidthCodec, float64_chunks
from kdfast.labels import SoftLabels

__all__ = ["Dense"]

LEVELS = 254  # codes 0 ... 254 are steps below the row's maximum
MASKED = 255  # the code of -inf


class Dense(FixedWidthCodec):
    """Log-probabilities, quantised linearly per row: column j is ``-step * code_j`` up to the row's normalisation.

    ``step`` (float32) is the distance from the row's largest to its smallest finite log-probability, over 254.
    Code 255 is -inf, and exact. A decoded log-probability is off by at most ``step``: half of that is rounding, half
    the normalisation. At temperature T divide by T. It serves every temperature, so ``temperatures`` is only noted.

    Args:
        max_error: the largest error in nats a row may have; one that spans more than ``254 * max_error`` is refused
            (mask columns with -inf, not with a large negative number).
    """

    name = "dense"

    def __init__(self, vocab_size: int, temperatures: Sequence[float], *, max_error: float = 0.5) -> None:
        super().__init__(vocab_size, temperatures)
        if not max_error > 0:
            raise ValueError(f"max_error must be positive, got {max_error}")
        self.max_error = float(max_error)
        self.row_dtype = np.dtype([("step", "<f4"), ("codes", "u1", (self.vocab_size,))])

    def config(self) -> dict[str, Any]:
        return {"max_error": self.max_error}

    def select(self, logits: Tensor, key: bytes) -> SoftLabels:
        log_probs = torch.cat([z.log_softmax(1).float() for z in float64_chunks(logits)]).cpu()
        step = _step(log_probs.numpy())
        for row in np.flatnonzero(step > np.float32(self.max_error))[:1]:
            raise ValueError(
                f"row {row} spans {step[row] * LEVELS:.6g} nats, so that 8 bits are off by up to {step[row]:.4g} nats "
                f"where max_error allows {self.max_error:g}; masked columns must be -inf"
            )
        return SoftLabels.dense(log_probs)

    def encode(self, labels: SoftLabels) -> bytes:
        values = labels.values.numpy()
        out = np.empty(len(labels), self.row_dtype)
        out["step"] = _step(values)
        step = np.where(out["step"] > 0, out["step"], np.float32(1))[:, None]  # a flat row: all codes are 0
        finite = np.isfinite(values)
        below = np.where(finite, values.max(1, keepdims=True) - values, 0)
        out["codes"] = np.where(finite, np.rint(below / step).clip(0, LEVELS), MASKED)
        return out.tobytes()

    def unpack(self, packed: NDArray[Any]) -> SoftLabels:
        codes, step = packed["codes"], packed["step"]
        if not ((step >= 0) & (step <= np.float32(self.max_error))).all():  # NaN included
            raise ValueError(f"a row's step is outside [0, {self.max_error:g}]")
        log_probs = codes * -step[:, None]
        masked = codes == MASKED
        if masked.any():
            if masked.all(1).any():
                raise ValueError("a row has no finite column")
            log_probs[masked] = -np.inf
        return SoftLabels.dense(torch.from_numpy(log_probs).log_softmax(1))


def _step(log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows,): from the largest to the smallest finite value of each row, over the number of levels."""
    smallest = np.where(np.isfinite(log_probs), log_probs, np.float32(np.inf)).min(1)
    step: NDArray[np.float32] = (log_probs.max(1) - smallest) / np.float32(LEVELS)
    return step
