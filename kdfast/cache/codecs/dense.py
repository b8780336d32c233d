"""``dense``: every column in 8 or 4 bits, for small vocabularies (classification)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._C import check_codes
from kdfast.cache.codecs.base import FixedWidthCodec, float64_chunks
from kdfast.cache.codecs.registry import register
from kdfast.labels import Dense as DenseLabels
from kdfast.labels import SoftLabels

__all__ = ["Dense"]

# How far below the row's maximum each code lies, in steps: the widest gap between two neighbours is one step.
LEVELS = {
    8: np.arange(255.0),
    # Closer together near the top, where the probability is: half the KL of equal distances at temperature 1, and
    # still as good as they are at 4.
    4: np.arange(15.0) ** 1.5 / (14**1.5 - 13**1.5),
}
MASKED = {8: 255, 4: 15}  # the code of -inf
MAX_ERROR = {8: 0.5, 4: 4.0}
MOST_ERROR = 1e30  # nats: 254 times it is finite in float32
TINY = np.finfo(np.float32).tiny  # steps below it have lost digits, and levels are off


@register
class Dense(FixedWidthCodec):
    """Log-probabilities, quantised per row: column j is ``-step * level(code_j)`` up to the row's normalisation.

    With 8 bits the level of a code is the code itself, 0 ... 254; with 4 bits it is ``code**1.5`` over
    ``14**1.5 - 13**1.5``, 0 ... 14, two codes to a byte. The last code is -inf, and exact. ``step`` (float32) is the
    distance from the row's largest to its smallest finite log-probability, over the last level. A decoded
    log-probability is off by at most ``step``: half of that is rounding, half the normalisation. At temperature T
    divide by T. It serves every temperature, so ``temperatures`` is only noted.

    Args:
        bits: 8 or 4.
        max_error: the largest error in nats a row may have: 0.5 for 8 bits, 4 for 4 (far below the maximum; near it the
            error is a tenth of that). One that spans more than it times the last level (127 or 38 nats) is refused
            (mask columns with -inf, not with a large negative number).
    """

    name = "dense"
    kind = DenseLabels.kind

    def __init__(
        self, vocab_size: int, temperatures: Sequence[float], *, bits: int = 8, max_error: float | None = None
    ) -> None:
        super().__init__(vocab_size, temperatures)
        if bits not in LEVELS:
            raise ValueError(f"bits must be one of {sorted(LEVELS)}, got {bits!r}")
        max_error = MAX_ERROR[bits] if max_error is None else max_error
        if not 0 < max_error <= MOST_ERROR:
            raise ValueError(f"max_error must be positive, got {max_error}; at most {MOST_ERROR:g} is finite")
        self.bits, self.max_error = int(bits), float(max_error)
        self._levels, self._masked = LEVELS[bits], MASKED[bits]
        code_bytes = (self.vocab_size * bits + 7) // 8
        self.row_dtype = np.dtype([("step", "<f4"), ("codes", "u1", (code_bytes,))])

    def config(self) -> dict[str, Any]:
        # Caches older than the option have no bits.
        return {"max_error": self.max_error} | ({} if self.bits == 8 else {"bits": self.bits})

    def select(self, logits: Tensor, key: bytes) -> DenseLabels:
        log_probs = torch.cat([z.log_softmax(1).float() for z in float64_chunks(logits)]).cpu()
        step = self._step(log_probs.numpy())
        for row in np.flatnonzero(step > np.float32(self.max_error))[:1]:
            raise ValueError(
                f"row {row} spans {step[row] * self._levels[-1]:.6g} nats, so that {self.bits} bits are off by up to "
                f"{step[row]:.4g} nats where max_error allows {self.max_error:g}; masked columns must be -inf"
            )
        return DenseLabels(vocab_size=self.vocab_size, values=log_probs)

    def encode(self, labels: SoftLabels) -> bytes:
        values = labels.values.numpy()
        out = np.empty(len(labels), self.row_dtype)
        out["step"] = self._step(values)
        step = np.where(out["step"] > 0, out["step"], np.float32(1))[:, None]  # a flat row: all codes are 0
        finite = np.isfinite(values)
        below = np.where(finite, values.max(1, keepdims=True) - values, 0)
        out["codes"] = self._pack(np.where(finite, self._nearest(below / step), self._masked).astype(np.uint8))
        return out.tobytes()

    def unpack(self, packed: NDArray[Any]) -> DenseLabels:
        codes, step = self._unpack(packed["codes"]), packed["step"]
        if not ((step >= 0) & (step <= np.float32(self.max_error))).all():  # NaN included
            raise ValueError(f"a row's step is outside [0, {self.max_error:g}]")
        has_masked = self._check_codes(codes, step)
        levels = codes if self.bits == 8 else self._levels.astype(np.float32).take(codes, mode="clip")
        log_probs = levels * -step[:, None]
        if has_masked:
            log_probs[codes == self._masked] = -np.inf
        return DenseLabels(vocab_size=self.vocab_size, values=torch.from_numpy(log_probs).log_softmax(1))

    def _check_codes(self, codes: NDArray[np.uint8], step: NDArray[np.float32]) -> bool:
        """Whether a column is masked.

        Raises:
            ValueError: not each row's largest column has code 0 and its smallest finite one the last.
        """
        spread = np.ascontiguousarray(step >= TINY)
        bad, has_masked = check_codes(codes, self._masked - 1, spread)
        if bad >= 0 and codes[bad].all():
            raise ValueError("a row has no finite column, or none of code 0")
        if bad >= 0:
            raise ValueError(f"a row's step is not 0, but none of its codes is {self._masked - 1}")
        flat = step == 0
        if flat.any() and not np.isin(codes[flat], (0, self._masked)).all():
            raise ValueError("a row's step is 0, but not all of its codes are")
        return has_masked

    def _step(self, log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(rows,): from the largest to the smallest finite value of each row, over the last level."""
        smallest = np.where(np.isfinite(log_probs), log_probs, np.float32(np.inf)).min(1)
        step: NDArray[np.float32] = (log_probs.max(1) - smallest) / np.float32(self._levels[-1])
        return step

    def _nearest(self, levels: NDArray[Any]) -> NDArray[Any]:
        if self.bits == 8:
            return np.rint(levels).clip(0, self._levels[-1])
        middle = ((self._levels[1:] + self._levels[:-1]) / 2).astype(np.float32)
        return np.searchsorted(middle, levels)

    def _pack(self, codes: NDArray[np.uint8]) -> NDArray[Any]:
        if self.bits == 8:
            return codes
        if self.vocab_size % 2:
            codes = np.pad(codes, ((0, 0), (0, 1)))
        return codes[:, ::2] | codes[:, 1::2] << 4

    def _unpack(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.bits == 8:
            return packed
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), 2 * packed.shape[1])
        if self.vocab_size % 2 and codes[:, -1].any():
            raise ValueError("the half byte after a row's last code is not 0")
        return codes[:, : self.vocab_size]
