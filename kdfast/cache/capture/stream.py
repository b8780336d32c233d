"""``Stream``: a loader that is read once, though a codec learns from its first batches before they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Stream"]

MOST_BYTES = 2**31  # of batches that are kept: some 200 million tokens' ids, or 3,500 images


class Stream:
    """A loader's batches, of which the first can be had several times before all of them are iterated over, once.

    The loader may be of a kind that gives its batches once only, such as a ``DataLoader`` over an open file, a queue or
    a socket: nothing tells. So what ``first`` reads is kept, and iterating begins with it.

    Args:
        loader: the batches.
        only_first: end with the batches that ``first`` has read.
    """

    def __init__(self, loader: Iterable[Any], *, only_first: bool = False) -> None:
        self._loader, self._only_first = loader, only_first
        self._rest: Iterator[Any] | None = None
        self._kept: list[Any] = []
        self._bytes, self._ended = 0, False

    def first(self) -> Iterator[Any]:
        """Iterate over the batches from the start, at most ``MOST_BYTES`` of them."""
        yield from self._kept
        while self._bytes < MOST_BYTES and not self._ended:
            for batch in self._read():
                kept = _copy(batch)
                self._kept.append(kept)
                self._bytes += _nbytes(kept)
                yield kept
                break
            else:
                self._ended = True

    def __iter__(self) -> Iterator[Any]:
        kept, self._kept = self._kept[::-1], []
        while kept:
            yield kept.pop()  # each is let go of when the next one is asked for
        if not (self._ended or self._only_first):
            yield from self._read()

    def _read(self) -> Iterator[Any]:
        if self._rest is None:
            self._rest = iter(self._loader)
        return self._rest


def _copy(batch: Any) -> Any:
    """A copy of ``batch``, for a loader may fill the same tensors again. What cannot be copied is kept as it is."""
    try:
        return deepcopy(batch)
    except Exception:  # whatever a batch's own class raises
        return batch


def _nbytes(value: Any) -> int:
    """The bytes of the tensors and arrays inside ``value``."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0
