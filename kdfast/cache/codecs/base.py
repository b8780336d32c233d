"""The base of all codecs. A codec chooses what to keep of a row, and lays it out as bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import index
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.labels import Ragged, SoftLabels
from kdfast.labels.distance import Distances, distances
from kdfast.labels.head import OutputLayer

__all__ = [
    "HIDDEN_STATES",
    "LOGITS",
    "MAX_VOCAB",
    "PREPARE_ROWS",
    "Addressable",
    "CaptureSource",
    "Codec",
    "Files",
    "FixedWidthCodec",
    "float64_chunks",
    "require_kind",
]

L = TypeVar("L", bound=SoftLabels)

MAX_VOCAB = 2**24
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of a temperature
LOGITS, HIDDEN_STATES = "logits", "hidden states"  # what a codec can select from
PREPARE_ROWS = 65536  # of a capture: the first ones, which a codec may learn from before any is stored
# Elements converted to float64 at a time. On a CPU the copies stay in cache (3 times as fast as 2**24, measured);
# elsewhere launches cost more than memory.
CPU_CHUNK = 2**20
DEVICE_CHUNK = 2**25


class Files(Protocol):
    """The files of a cache, by name. A ``Storage`` is one."""

    def list(self) -> list[str]:
        """The names of all files. Raises ``FileNotFoundError`` if the cache is not there yet."""

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a whole file."""

    def create(self) -> None:
        """Make the cache's place, if it is not there."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def publish(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a small file, whole or not at all."""

    def publish_new(self, name: str, data: bytes) -> bool:
        """Write a small file unless there is one of this name. Returns whether it is this one."""


class CaptureSource(Protocol):
    """A capture that is about to begin, as far as a codec may ask about it."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits that will be stored."""

    @property
    def temperatures(self) -> Sequence[float]:
        """The temperatures that the cache is for."""

    @property
    def files(self) -> Files:
        """The cache's files, which an earlier session of the capture may have left."""

    def first_rows(self) -> Iterator[Tensor]:
        """Run the teacher over the first ``PREPARE_ROWS`` rows: (rows, vocab_size) logits, one record after another.

        It can be called any number of times, and gives the same records each time.
        """


class Codec(ABC):
    """Turns teacher logits into bytes and back, in two steps.

    ``select`` decides what is kept of one record, as ``SoftLabels``, rounded to what the bytes can hold; ``encode``
    lays the kept labels of a whole block (records one after another) out as bytes, and loses nothing. A block's
    length is the codec's own affair: the container stores it.

    A codec's options are constructor keywords. ``config()`` gives them back, JSON-serialisable, and
    ``type(codec)(vocab_size, temperatures, **type(codec).options(codec.config(), read_asset))`` is the same codec.

    A codec that codes with statistics of its own rows says how many it wants to see first (``learn_rows``), gets
    them (``learn``), and is given the result (``use_model``), without which it neither encodes nor decodes. A shard
    holds the model of its blocks. Large tables that many caches may share are ``assets``: files beside the shards,
    named by their contents.

    What others ask of a codec before there is one are class attributes and class methods: what its labels are
    (``kind``), what it selects from (``input_name``), and how a capture completes its options.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = ""  # of the labels that records decode to: a key of ``kdfast.labels.support.SERVES``
    input_name: ClassVar[str] = LOGITS  # what select takes: LOGITS or HIDDEN_STATES
    # Whether select draws, so that another key gives other labels, which on average are the row itself.
    drawn: ClassVar[bool] = False
    learn_rows: int = 0  # selected rows wanted before the first block is encoded; 0: it has no model
    model: bytes = b""
    noise: str = ""  # of labels that are drawn: what they have in place of a floor, in words
    heads: int | None = None  # the labels of a row are so many of its likeliest columns, and the mass of all others
    rows_per_byte: int | None = None  # no block has more, where that is known: a reader checks it before it makes room

    def __init__(self, vocab_size: int, temperatures: Sequence[float]) -> None:
        self.vocab_size = index(vocab_size)
        if not 1 <= self.vocab_size <= MAX_VOCAB:
            raise ValueError(f"vocab_size must lie in [1, {MAX_VOCAB}], got {vocab_size}")
        if not temperatures or not all(SMALLEST <= t <= LARGEST for t in temperatures):
            raise ValueError(f"temperatures must be positive and finite, got {tuple(temperatures)}, in float32")
        self.temperatures = tuple(float(t) for t in temperatures)
        self.input_width = self.vocab_size  # columns of what select takes

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The options that the codec was built with, JSON-serialisable."""

    @classmethod
    def options(cls, config: Mapping[str, Any], read_asset: Callable[[str], bytes]) -> dict[str, Any]:
        """Constructor keywords from what ``config`` gave. ``read_asset(file name)`` gives the bytes of an asset."""
        return dict(config)

    def keywords(self) -> dict[str, Any]:
        """The constructor keywords that make this codec."""
        return type(self).options(self.config(), self.assets().__getitem__)

    def assets(self) -> dict[str, bytes]:
        """Files that a reader needs beside the shards, by name. The name holds a digest of the contents."""
        return {}

    # ---- how a capture completes the options -----------------------------------------------------------------------

    @classmethod
    def refined(cls, options: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        """``options`` with which one record is worth the mean of ``epochs`` draws; unchanged where nothing is drawn."""
        return dict(options)

    @classmethod
    def for_head(cls, options: Mapping[str, Any], head: OutputLayer) -> dict[str, Any]:
        """``options`` with those that the teacher's output layer decides, for a codec of hidden states."""
        return dict(options)

    @classmethod
    def learns_first(cls, options: Mapping[str, Any], files: Files) -> bool:
        """Whether ``prepare`` would run the teacher: what it learns is neither in ``options`` nor among ``files``."""
        return False

    @classmethod
    def prepare(cls, options: Mapping[str, Any], source: CaptureSource) -> dict[str, Any]:
        """``options`` with what a capture of ``source`` takes from its cache or learns from its first rows.

        Raises:
            ValueError: an option of the wrong kind, or a source that cannot be learned from.
        """
        return dict(options)

    @classmethod
    def narrowing(
        cls, source: Codec, temperatures: Sequence[float], options: Mapping[str, Any]
    ) -> Callable[[SoftLabels], Ragged]:
        """A function from labels of ``source`` to labels of this codec with ``options``, which hold no more.

        Raises:
            ValueError: labels of ``source`` do not hold what this codec stores. The message says what they hold.
        """
        raise ValueError(
            f"holds {source.kind} labels ({source.name}), which a {cls.name} cache cannot be made from: only "
            "dense labels tell everything, and topk ones what another topk cache needs. Run the teacher again"
        )

    # ---- the model and other tables --------------------------------------------------------------------------------

    def learn(self, labels: SoftLabels) -> bytes:
        """Learn a model from ``labels``, the first rows selected, which may be fewer than ``learn_rows``."""
        raise NotImplementedError(f"{self.name} has no model")

    def use_model(self, model: bytes) -> None:
        """Encode and decode with ``model`` from now on. Raises ``ValueError`` for bytes that ``learn`` did not make."""
        if model:
            raise ValueError(f"a model of {len(model)} bytes, but {self.name} has none")

    def use_head(self, head: OutputLayer) -> None:
        """Attach the teacher's output layer to decoded labels. Raises ``ValueError`` unless it is the cache's own."""
        raise ValueError(f"its codec is {self.name}, which takes no head")

    # ---- from logits to bytes and back -----------------------------------------------------------------------------

    @abstractmethod
    def select(self, logits: Tensor, key: bytes) -> SoftLabels:
        """Choose what to keep of one record, rounded to what the bytes can hold.

        Args:
            logits: (rows, vocab_size), any float dtype, any device. No NaN, no +inf, a finite column in each row.
            key: the record's 16-byte digest: the seed of a codec that draws.

        Raises:
            ValueError: a row that cannot be stored within the codec's promised error, by its number.
        """

    def as_stored(self, labels: SoftLabels) -> SoftLabels:
        """``labels`` that ``select`` gave, as a reader will see them, where encoding rounds them further."""
        return labels

    def distances(self, rows: Tensor, labels: SoftLabels) -> Distances | None:
        """How far ``labels`` lie from the teacher's rows, at the first temperature; None where that cannot be known.

        It is not asked of a codec that draws, whose labels are the row itself on average.

        Args:
            rows: (rows, columns) what ``select`` was given, of any float dtype and device.
            labels: what it gave, on the CPU.
        """
        return distances(rows, self.as_stored(labels).to(rows.device), self.temperatures[0])

    @cached_property
    def empty(self) -> SoftLabels:
        """Labels of zero rows, of the kind, vocabulary and temperatures that ``select`` gives."""
        return self.select(torch.zeros(0, self.input_width), bytes(16))

    def check(self, labels: SoftLabels) -> None:
        """Raise ``ValueError`` unless ``labels`` from elsewhere can be stored exactly as they are."""
        if not self.learn_rows:
            self.encode(labels)

    @abstractmethod
    def encode(self, labels: SoftLabels) -> bytes:
        """Encode a block. ``labels`` are selected records, concatenated, on the CPU."""

    @abstractmethod
    def decode(self, data: NDArray[np.uint8], units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels:
        """Decode rows ``wanted`` of some units, in the order of ``wanted``. Rows may repeat.

        A unit is what can be decoded by itself: a whole block, or one row for an ``Addressable`` codec.

        Args:
            data: bytes that hold the units.
            units: (units, 3): each one's first byte, its length in bytes, its rows.
            wanted: row numbers, counted over all units one after another.

        Raises:
            ValueError: the bytes are not what ``encode`` writes. Any bytes may come; none may crash it.
        """

    def decode_on_device(self, data: Tensor, units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels | None:
        """``decode`` on the device that holds ``data``. Returns None where that cannot be done, and ``decode`` can."""
        return None


class Addressable(Codec):
    """A codec whose rows can be read one by one, without the rest of their block.

    ``decode`` is then given rows as its units, as ``locate`` has found them, never a whole block.
    """

    addressable = True  # an instance whose options rule it out says False, and is read by blocks

    @abstractmethod
    def locate(
        self, payload: NDArray[np.uint8], blocks: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """(n, 2): the first byte of each row in ``payload``, and its length in bytes.

        Args:
            payload: a shard's payload.
            blocks: (n, 3): first byte, length, rows of the block that each row lies in.
            rows: (n,): the number of each row within its block.

        Raises:
            ValueError: the block's own index of its rows is not what ``encode`` writes.
        """

    def check_index(self, block: NDArray[np.uint8], rows: int) -> None:
        """Raise ``ValueError`` unless the index of a whole block of ``rows`` rows is what ``encode`` writes.

        A reader asks once for each block, before it locates rows: what is located then cannot overlap.
        """


class FixedWidthCodec(Addressable):
    """A codec whose rows have one layout, ``row_dtype``: a packed little-endian structure.

    A reader takes the rows it wants straight from the file, from any number of blocks, and unpacks them in one go.
    """

    row_dtype: np.dtype[Any]

    @abstractmethod
    def unpack(self, packed: NDArray[Any]) -> SoftLabels:
        """Decode ``packed``, a (rows,) array of ``row_dtype``.

        Raises:
            ValueError: a row is not what ``encode`` writes. Any bytes may come; none may crash it.
        """

    def check(self, labels: SoftLabels) -> None:
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is looked at
            encoded = self.encode(labels)
        try:
            self.unpack(np.frombuffer(encoded, self.row_dtype))
        except ValueError as error:  # a reader would refuse the row, and all that lie in one batch with it
            raise ValueError(f"codec {self.name!r} cannot store it: {error}") from error

    def as_stored(self, labels: SoftLabels) -> SoftLabels:
        return self.unpack(np.frombuffer(self.encode(labels), self.row_dtype))

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return self.row_dtype.itemsize

    def locate(
        self, payload: NDArray[np.uint8], blocks: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        begin, length, count = blocks.T
        if (length != count * self.row_bytes).any():
            raise ValueError(f"a block is not its rows of {self.row_bytes} bytes one after another")
        return np.stack([begin + rows * self.row_bytes, np.full_like(rows, self.row_bytes)], 1)

    def decode(self, data: NDArray[np.uint8], units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels:
        begin, length, count = units.T
        for at in np.flatnonzero(length != count * self.row_bytes)[:1]:
            raise ValueError(f"{count[at]} rows of {self.row_bytes} bytes expected, found {length[at]} bytes")
        first = count.cumsum() - count
        if (begin == first * self.row_bytes).all():  # as labels are packed: nothing lies between the units
            rows = data[: int(count.sum()) * self.row_bytes].view(f"V{self.row_bytes}").take(wanted)
            return self.unpack(rows.view(self.row_dtype))
        unit = np.searchsorted(first, wanted, side="right") - 1
        start = begin[unit] + (wanted - first[unit]) * self.row_bytes
        rows = data[start[:, None] + np.arange(self.row_bytes)] if len(start) else np.empty(0, np.uint8)
        return self.unpack(rows.reshape(-1).view(self.row_dtype))


def require_kind(labels: SoftLabels, kind: type[L]) -> L:
    """``labels``, which are to be of the class ``kind``. Raises ``TypeError`` if they are not."""
    if not isinstance(labels, kind):
        raise TypeError(f"labels must be of kind {kind.kind}, got {labels.kind}")
    return labels


def float64_chunks(logits: Tensor) -> Iterator[Tensor]:
    """Yield ``logits`` in float64, a few rows at a time, so that the copy stays small. There is at least one chunk."""
    elements = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    rows = max(1, elements // logits.shape[1])
    for start in range(0, max(1, logits.shape[0]), rows):
        yield logits.detach()[start : start + rows].double()
