"""The interface of importers: records of top-k log-probabilities that another tool has stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.errors import CacheError

__all__ = ["Record", "Source", "named", "token_ids"]

MOST_IDS = 2**32  # an id's place in a key has 32 bits


@dataclass(frozen=True)
class Record:
    """One sample. Row i is the teacher's distribution after it has read ``token_ids[: i + 1]``.

    Entries lie row after row: row i owns the next ``counts[i]`` of ``ids`` and ``log_probs``, in any order.
    """

    name: str  # where it was read, for messages
    token_ids: NDArray[np.int64]  # (tokens,), at least as many as rows
    counts: NDArray[np.int64]  # (rows,)
    ids: NDArray[np.int64]  # (entries,)
    log_probs: NDArray[np.float64]  # (entries,) at T = 1; -inf: not an entry

    @classmethod
    def of(cls, name: str, token_ids: NDArray[np.int64], rows: Sequence[Sequence[tuple[int, float]]]) -> Record:
        """Make a record of rows that are lists of (id, log-probability)."""
        pairs = [pair for row in rows for pair in row]
        return cls(
            name,
            token_ids,
            np.array([len(row) for row in rows], np.int64),
            np.array([token for token, _ in pairs], np.int64),
            np.array([value for _, value in pairs], np.float64),
        )

    @property
    def key(self) -> Any:
        """The record's key in the cache: all of the sample's ids, the last one included."""
        return self.token_ids


class Source(ABC):
    """An iterable of the records of files in some format.

    Attributes:
        what: the format, in words.
        k: the most entries that a row has.
        value_dtype: the narrowest of float16 and float32 that holds the stored values exactly.
        size: how many records there are, if that is known beforehand.
    """

    what: str
    k: int
    value_dtype: str = "float32"
    size: int | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[Record]:
        """Iterate over the records, in the order of the files.

        Raises:
            CacheError: a file is not of the format; the message names file and record.
        """


def token_ids(values: Any) -> NDArray[np.int64]:
    """A sample's ids as (tokens,) int64. Numbers that are whole pass for ids, whatever their type.

    Raises:
        ValueError: they are no list of whole numbers in [0, 2**32); the message says which is not.
    """
    array = np.asarray(values)
    flags = isinstance(values, list) and any(isinstance(value, bool) for value in values)
    if array.ndim != 1 or array.dtype.kind not in "iuf" or flags:
        raise ValueError(f"its input_ids are no list of ids: {values!r:.80}")
    wrong = ~((array >= 0) & (array < MOST_IDS))  # NaN included
    if array.dtype.kind == "f":
        wrong |= array != np.floor(array)
    for at in np.flatnonzero(wrong)[:1]:
        raise ValueError(f"its input_ids hold {array[at]}, which is no id")
    return array.astype(np.int64)


@contextmanager
def named(where: str) -> Iterator[None]:
    """A context in which what a malformed file makes Python raise becomes a ``CacheError`` about ``where``."""
    try:
        yield
    except CacheError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise CacheError(f"{where}: {error!r:.300}") from error
