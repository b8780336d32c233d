"""Record keys: what a record is found by, as 16 bytes."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "DIGEST_BYTES",
    "Key",
    "describe",
    "make_key",
    "make_keys",
    "number_key",
    "number_keys",
    "number_of",
    "replica_key",
]

DIGEST_BYTES = 16


class Key(bytes):
    """The digest a record is stored under. ``cache.keys()`` gives these, and they are accepted as keys."""

    def __new__(cls, digest: bytes) -> Key:
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"a Key has {DIGEST_BYTES} bytes, got {len(digest)}")
        return super().__new__(cls, digest)

    def __repr__(self) -> str:
        return f"Key({self.hex()})"


def make_key(key: Any) -> Key:
    """The digest of ``key``: BLAKE2b-128 over its canonical bytes, personalised with its type.

    Args:
        key: token ids (a 1-D integer tensor or array, ids in [0, 2**32)), a name (str, bytes or int), or a ``Key``.

    The type takes part in the hash: 5, "5", b"5" and ids [5] are four different keys. The width of an integer
    does not: int32 and int64 ids are the same key.

    Raises:
        TypeError: another type, or ids that are not 1-D integers.
        ValueError: an id outside [0, 2**32).
    """
    if isinstance(key, Key):
        return key
    if isinstance(key, str):
        return _digest(b"kdfast:str", key.encode("utf-8", "surrogatepass"))
    if isinstance(key, bytes):
        return _digest(b"kdfast:bytes", key)
    if isinstance(key, (Tensor, np.ndarray)):
        return _digest(b"kdfast:ids", _canonical_ids(key).tobytes())
    if isinstance(key, Integral) and not isinstance(key, bool):
        return _digest(b"kdfast:int", str(int(key)).encode())
    raise TypeError(f"a key is a 1-D integer tensor of ids, a str, bytes or an int, got {type(key).__name__}")


def make_keys(keys: Iterable[Any]) -> list[Key]:
    """The digest of each key. Rows of a 2-D tensor or array are checked together, which takes 1 us a row, not 6."""
    if isinstance(keys, (Tensor, np.ndarray)) and keys.ndim == 2:
        return [_digest(b"kdfast:ids", row.tobytes()) for row in _canonical_ids(keys, 2)]
    return [make_key(key) for key in keys]


def replica_key(key: Any, replica: int) -> Key:
    """The key of one of several independent draws for a record. Number 0 is the record's own key.

    Args:
        key: as ``make_key`` takes it.
        replica: 0 ... 2**32 - 1, such as the epoch's number modulo the number of replicas.
    """
    if not 0 <= replica < 2**32:
        raise ValueError(f"a replica's number must lie in [0, 2**32), got {replica}")
    digest = make_key(key)
    return _digest(b"kdfast:replica", digest + replica.to_bytes(4, "little")) if replica else digest


def number_key(number: int) -> Key:
    """The key that stands for ``number`` while a cache with ``keys="range"`` is written. It is never stored."""
    return Key(number.to_bytes(DIGEST_BYTES, "big"))


def number_of(key: Key) -> int:
    """The integer that ``number_key`` has encoded as ``key``."""
    return int.from_bytes(key, "big")


def number_keys(first: int, count: int) -> NDArray[np.uint8]:
    """(count, 16) uint8: the number keys of ``first`` and the integers after it."""
    keys = np.zeros((count, 2), ">u8")
    keys[:, 1] = first + np.arange(count)
    return keys.view(np.uint8)


def describe(key: Any) -> str:
    """``key`` as an error message shows it: short, whatever its length."""
    if isinstance(key, (Tensor, np.ndarray)):
        start = ", ".join(str(int(i)) for i in key.reshape(-1)[:4])
        return f"ids [{start}{', ...' if key.reshape(-1).shape[0] > 4 else ''}] of shape {tuple(key.shape)}"
    text = repr(key)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _digest(person: bytes, data: bytes) -> Key:
    return Key(blake2b(data, digest_size=DIGEST_BYTES, person=person).digest())


def _canonical_ids(ids: Tensor | np.ndarray[Any, Any], dims: int = 1) -> NDArray[np.uint32]:
    """The ids as little-endian u32, which are the same bytes for every integer dtype and every device."""
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids
    if array.ndim != dims or array.dtype.kind not in "iu":
        raise TypeError(f"ids used as a key must be {dims}-D integers, got {array.dtype} of shape {array.shape}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 2**32):
        raise ValueError(f"ids used as a key must lie in [0, 2**32), got {int(array.min())} to {int(array.max())}")
    return array.astype("<u4")
