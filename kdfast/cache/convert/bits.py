"""Unpacking bit strings and floating-point numbers from rows of bytes, as DistillKit packs them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOAT_BYTES", "id_bits", "read_bits", "read_floats", "read_words"]

FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def id_bits(vocab_size: int) -> int:
    """Bits of an id: ceil(log2 V), computed in single precision as the writers of these files compute it."""
    return math.ceil(float(np.log2(np.float32(vocab_size))))


def read_bits(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """(rows, count) numbers of ``bits`` bits each, most significant bit first, from (rows, bytes)."""
    digits = np.unpackbits(data, axis=1, count=bits * count).reshape(len(data), count, bits)
    numbers = np.zeros((len(data), count), np.int64)
    for position in range(bits):
        numbers = numbers << 1 | digits[:, :, position]
    return numbers


def read_words(words: NDArray[np.uint64], bits: int, count: int) -> NDArray[np.int64]:
    """(rows, count) numbers from (rows, words): as many as fit in each 64-bit word, the first in its lowest bits."""
    per_word = 64 // bits
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    numbers = words[:, :, None] >> shifts & np.uint64((1 << bits) - 1)
    return numbers.reshape(len(words), -1)[:, :count].astype(np.int64)


def read_floats(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    """(rows, numbers) float64 from (rows, bytes) of little-endian ``dtype``."""
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return data.view(np.dtype(dtype).newbyteorder("<")).astype(np.float64)
