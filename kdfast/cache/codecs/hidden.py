"""``hidden``: the teacher's last hidden states, for a student that trains beside the teacher's output layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import HIDDEN_STATES, FixedWidthCodec
from kdfast.cache.codecs.registry import register
from kdfast.labels import Hidden as HiddenLabels
from kdfast.labels import SoftLabels
from kdfast.labels.distance import Distances, distances
from kdfast.labels.head import OutputLayer

__all__ = ["Hidden"]

MAX_WIDTH = 2**24
LEVELS = 127  # codes -127 ... 127
TINY = torch.finfo(torch.bfloat16).tiny  # below it a bfloat16 loses digits
INFINITE = 0x7F80  # exponent bits of a bfloat16 that is infinite or NaN


@register
class Hidden(FixedWidthCodec):
    """Hidden states in 16 or 8 bits. With the teacher's output layer they are its logits: they serve every divergence
    at every temperature.

    A writer takes hidden states, (rows, width), where other codecs take logits. ``bits=16`` is bfloat16: exact for a
    bfloat16 teacher, else within 2**-9 of each value. ``bits=8`` is a code per value, -127 ... 127, times the row's
    step, a bfloat16 next to its largest magnitude over 127: a value is off by at most half a step, a logit by at most
    half a step times the 1-norm of its row of the output layer (and the layer's scale). Rows below 1.5e-36 are 0.

    Args:
        width: of the hidden states.
        head: the output layer, or its ``fingerprint``. A cache is opened with that layer and no other. With the layer
            itself a writer can say how far from the teacher's logits the rounding is.
        bits: 16 or 8.
    """

    name = "hidden"
    kind = HiddenLabels.kind
    input_name = HIDDEN_STATES

    def __init__(
        self, vocab_size: int, temperatures: Sequence[float], *, width: int, head: str | OutputLayer, bits: int = 16
    ) -> None:
        super().__init__(vocab_size, temperatures)
        layer, head = (head, head.fingerprint) if isinstance(head, OutputLayer) else (None, head)
        if not 1 <= index(width) <= MAX_WIDTH:
            raise ValueError(f"width must be at least 1 and at most {MAX_WIDTH}, got {width}")
        if bits not in (8, 16):
            raise ValueError(f"bits must be 8 or 16, got {bits!r}")
        if not isinstance(head, str) or not re.fullmatch("[0-9a-f]{32}", head):
            raise ValueError(f"head must be an output layer's fingerprint, 32 hexadecimal digits, got {head!r}")
        self.input_width, self.head, self.bits = index(width), head, int(bits)
        self._layer: OutputLayer | None = None
        values = ("values", "<u2" if bits == 16 else "i1", (self.input_width,))
        self.row_dtype = np.dtype([values] if bits == 16 else [("step", "<u2"), values])
        if layer is not None:
            self.use_head(layer)

    def use_head(self, head: OutputLayer) -> None:
        if head.fingerprint != self.head:
            raise ValueError(
                f"its hidden states are for the head {self.head}, but the head given is {head.fingerprint}"
            )
        if (head.vocab_size, head.width) != (self.vocab_size, self.input_width):
            raise ValueError(
                f"its labels have {self.vocab_size} columns of hidden states of width {self.input_width}, but the head "
                f"given is ({head.vocab_size}, {head.width})"
            )
        self._layer = head

    def config(self) -> dict[str, Any]:
        return {"width": self.input_width, "head": self.head, "bits": self.bits}

    @classmethod
    def for_head(cls, options: Mapping[str, Any], head: OutputLayer) -> dict[str, Any]:
        return {"width": head.width, "head": head, **options}

    def select(self, logits: Tensor, key: bytes) -> HiddenLabels:
        hidden = logits.detach().bfloat16() if self.bits == 16 else logits.detach().float()
        for row in (~hidden.isfinite().all(1)).nonzero().flatten().tolist()[:1]:
            raise ValueError(f"row {row} has a hidden state that is infinite, NaN or beyond bfloat16")
        if self.bits == 8:
            step = _step(hidden)[:, None]
            hidden = _codes(hidden, step) * step
        return HiddenLabels(vocab_size=self.vocab_size, values=hidden)

    def distances(self, rows: Tensor, labels: SoftLabels) -> Distances | None:
        if self._layer is None or self._layer.weight.device != rows.device:
            return None
        stored = self.as_stored(labels).values.to(rows.device)
        both = self._layer.logits(torch.cat([rows.float(), stored.float()]))  # one product: it converts the layer
        return distances(both[: len(rows)], SoftLabels.dense(both[len(rows) :]), self.temperatures[0])

    def encode(self, labels: SoftLabels) -> bytes:
        out = np.empty(len(labels), self.row_dtype)
        if self.bits == 16:
            out["values"] = _bits(labels.values.bfloat16())
        else:
            # The largest code of a row is 127, so that what select has rounded has the step it was rounded with.
            step = _step(labels.values)
            out["step"] = _bits(step.bfloat16())
            out["values"] = _codes(labels.values, step[:, None]).to(torch.int8).numpy()
        return out.tobytes()

    def unpack(self, packed: NDArray[Any]) -> HiddenLabels:
        if self.bits == 16:
            hidden = _floats(packed["values"])
        else:
            if (packed["step"] >= INFINITE).any():  # the sign bit included
                raise ValueError("a row's step is negative, infinite or NaN")
            step = _floats(packed["step"]).float().numpy()
            # In this order: the magnitude of -128 is no i8.
            if (packed["values"] == -LEVELS - 1).any():
                raise ValueError(f"a value's code is {-LEVELS - 1}")
            largest = np.abs(packed["values"]).max(1, initial=0)
            if (largest != np.where(step >= TINY, LEVELS, 0)).any() or ((step > 0) & (step < TINY)).any():
                raise ValueError(f"a row's largest code is not {LEVELS}, or its step is not what goes with it")
            hidden = torch.from_numpy(packed["values"].astype(np.float32) * step[:, None])
        if not bool(hidden.isfinite().all()):
            raise ValueError("a hidden state is infinite or NaN")
        return HiddenLabels(vocab_size=self.vocab_size, values=hidden, head=self._layer)


def _step(hidden: Tensor) -> Tensor:
    """(rows,) float32 that bfloat16 holds. Rounding it moves 127 steps by a quarter of one at most."""
    step = (hidden.abs().amax(1) / LEVELS).bfloat16().float()
    return torch.where(step < TINY, 0.0, step)


def _codes(hidden: Tensor, step: Tensor) -> Tensor:
    return (hidden / torch.where(step > 0, step, torch.inf)).round().clamp(-LEVELS, LEVELS)


def _bits(x: Tensor) -> NDArray[np.int16]:
    """The bit patterns of bfloat16 numbers, which NumPy lacks."""
    bits: NDArray[np.int16] = x.contiguous().view(torch.int16).numpy()
    return bits.view("<u2")


def _floats(bits: NDArray[Any]) -> Tensor:
    # A copy whatever its strides: a field of a single row passes for contiguous, and those of odd rows are not aligned.
    return torch.from_numpy(np.array(bits, order="C").view(np.int16)).view(torch.bfloat16)
