"""Column ids of fixed width: 2 bytes, or 3 where the vocabulary needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["id_field", "pack_ids", "unpack_ids"]

WIDE_VOCAB = 65536  # a larger vocabulary takes 3-byte ids


def id_field(vocab_size: int, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a packed row's field that holds ids of ``shape``."""
    return ("<u2", shape) if vocab_size <= WIDE_VOCAB else ("u1", (*shape, 3))


def pack_ids(ids: NDArray[Any], vocab_size: int) -> NDArray[Any]:
    """The value to assign to a field of ids: (..., 3) bytes for a large vocabulary."""
    ids = np.ascontiguousarray(ids, "<u4")
    return ids if vocab_size <= WIDE_VOCAB else ids[..., None].view(np.uint8)[..., :3]


def unpack_ids(field: NDArray[Any], vocab_size: int) -> NDArray[np.int32]:
    """The ids of a field that ``pack_ids`` filled. Raises ``ValueError`` for an id outside the vocabulary."""
    ids: NDArray[np.int32] = field.astype(np.int32)
    if vocab_size > WIDE_VOCAB:
        ids = ids[..., 0] | ids[..., 1] << 8 | ids[..., 2] << 16
    if ids.size and int(ids.max()) >= vocab_size:
        raise ValueError(f"id {int(ids.max())} is outside the vocabulary of {vocab_size}")
    return ids
