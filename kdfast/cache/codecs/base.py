"""What a codec is: the choice of what to keep of a row, and its bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import isfinite
from operator import index
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdfast.labels import SoftLabels

__all__ = ["MAX_VOCAB", "Codec", "FixedWidthCodec", "RowChoice", "float64_chunks"]

RowChoice: TypeAlias = "slice | NDArray[np.int64]"  # either one indexes an array's first axis

MAX_VOCAB = 2**24
# Elements converted to float64 at a time. On a CPU the copies stay in cache (3 times as fast as 2**24, measured);
# elsewhere launches cost more than memory.
CPU_CHUNK = 2**20
DEVICE_CHUNK = 2**25


class Codec(ABC):
    """Turns teacher logits into bytes and back, in two steps.

    ``select`` decides what is kept of one record, as ``SoftLabels``; ``encode`` lays the kept labels of a whole block
    (records one after another) out as bytes. A block's length is the codec's own affair: the container stores it.

    A codec's options are constructor keywords. ``config()`` gives them back, JSON-serialisable, and
    ``type(codec)(vocab_size, temperatures, **codec.config())`` is the same codec.
    """

    name: ClassVar[str]

    def __init__(self, vocab_size: int, temperatures: Sequence[float]) -> None:
        self.vocab_size = index(vocab_size)
        if not 1 <= self.vocab_size <= MAX_VOCAB:
            raise ValueError(f"vocab_size must lie in [1, {MAX_VOCAB}], got {vocab_size}")
        if not temperatures or not all(isfinite(t) and t > 0 for t in temperatures):
            raise ValueError(f"temperatures must be positive and finite, got {tuple(temperatures)}")
        self.temperatures = tuple(float(t) for t in temperatures)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The options it was built with."""

    @abstractmethod
    def select(self, logits: Tensor, key: bytes) -> SoftLabels:
        """What to keep of one record.

        Args:
            logits: (rows, vocab_size), any float dtype, any device. No NaN, no +inf, a finite column in each row.
            key: the record's 16-byte digest: the seed of a codec that draws.

        Raises:
            ValueError: a row that cannot be stored within the codec's promised error, by its number.
        """

    @abstractmethod
    def encode(self, labels: SoftLabels) -> bytes:
        """The bytes of a block. ``labels`` are selected records, concatenated, on the CPU."""

    @abstractmethod
    def decode(self, block: NDArray[np.uint8], rows: int, wanted: RowChoice) -> SoftLabels:
        """Rows ``wanted`` of a block of ``rows`` rows, in the order of ``wanted``. Rows may repeat.

        Args:
            wanted: row numbers within the block (a reader gives these), or a slice.

        Raises:
            ValueError: the bytes are not what ``encode`` writes. Any bytes may come; none may crash it.
        """


class FixedWidthCodec(Codec):
    """A codec whose rows have one layout, ``row_dtype``: a packed little-endian structure.

    A reader takes the rows it wants straight from the file, from any number of blocks, and unpacks them in one go.
    """

    row_dtype: np.dtype[Any]

    @abstractmethod
    def unpack(self, packed: NDArray[Any]) -> SoftLabels:
        """The labels of ``packed``, (rows,) of ``row_dtype``.

        Raises:
            ValueError: a row is not what ``encode`` writes. Any bytes may come; none may crash it.
        """

    @property
    def row_bytes(self) -> int:
        return self.row_dtype.itemsize

    def decode(self, block: NDArray[np.uint8], rows: int, wanted: RowChoice) -> SoftLabels:
        if block.size != rows * self.row_bytes:
            raise ValueError(f"{rows} rows of {self.row_bytes} bytes expected, found {block.size} bytes")
        return self.unpack(block.view(self.row_dtype)[wanted])


def float64_chunks(logits: Tensor) -> Iterator[Tensor]:
    """``logits`` in float64, so many rows at a time that the copy stays small. At least one chunk, maybe empty."""
    elements = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, elements // logits.shape[1])
    for start in range(0, max(1, logits.shape[0]), rows):
        yield logits.detach()[start : start + rows].double()
