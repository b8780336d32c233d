"""The base of codecs that keep a few entries of a row: ids with a small integer each, and their bits."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._C import RowBounds, RowLayout, check_indexes, count_symbols, locate_rows
from kdfast.cache.codecs import entries_on_device
from kdfast.cache.codecs.base import Addressable
from kdfast.cache.codecs.model import IdOrder, Statistics, id_classes, pack_statistics, unpack_statistics
from kdfast.cache.selection.prototypes import PrototypeTable
from kdfast.labels import Prototype, Ragged, SoftLabels
from kdfast.labels.ragged import Tailed, same_table

__all__ = ["CODINGS", "EntryCodec", "EntryRows"]

CODINGS = ("blocks", "rows", "plain")
LEARN_ROWS = 16384
DIGEST = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class EntryRows:
    """Rows as the bit layer takes them. Entries of a row are in ascending order of rank."""

    # (rows, header_fields): the number of entries, the prototype if there is a table of them, then the codec's own.
    headers: NDArray[np.int32]
    ranks: NDArray[np.int32]  # (entries,)
    values: NDArray[np.int32]  # (entries,)


class EntryCodec(Addressable):
    """Rows of ids with a small integer each. Ids are coded by rank, in one order for all rows or one per prototype.

    Args:
        coding: ``"blocks"`` (entropy-coded, decoded block by block) or ``"rows"`` (every row by itself in whole bytes:
            for random access to single rows). Caches of ``"plain"`` (whole bytes per number, no order) are still read.
        prototypes: a table whose orders ids are ranked by.
    """

    def __init__(
        self,
        vocab_size: int,
        temperatures: Sequence[float],
        *,
        coding: str = "blocks",
        prototypes: PrototypeTable | None = None,
    ) -> None:
        super().__init__(vocab_size, temperatures)
        if len(self.temperatures) != 1:
            raise ValueError(f"it holds one temperature, got {self.temperatures}")
        if coding not in CODINGS:
            raise ValueError(f"coding must be one of {CODINGS}, got {coding!r}")
        if prototypes is not None and prototypes.vocab_size != self.vocab_size:
            raise ValueError(f"the prototypes have {prototypes.vocab_size} columns, the logits {self.vocab_size}")
        self.coding, self.prototypes = coding, prototypes
        self.addressable = coding != "blocks"
        # A row has at least a byte of an index, or a symbol of at most 4095 in 4096: that is 1 / 22,700 byte.
        self.rows_per_byte = 1 if self.addressable else 2**15
        self._bounded: RowBounds | None = None
        self.learn_rows = 0 if coding == "plain" or (coding == "rows" and prototypes is not None) else LEARN_ROWS

    # ---- what a codec of this kind defines -----------------------------------------------------------------------

    header_fields: int  # numbers that a row has before its entries, the number of entries being the first
    max_entries: int
    value_limit: int  # values lie in [0, value_limit)
    total: int = 0  # what a row's values, each plus 1, add up to; 0: that varies
    levels: NDArray[np.float32] | None = None  # (value_limit,): what values stand for; None: themselves
    # Where the last entry takes all that those before it have left, its value is 0, and a row without entries has this
    # as its last header field; -1: they need not go together.
    remainder: int = -1

    @property
    @abstractmethod
    def header_limits(self) -> tuple[int, ...]:
        """For each header field the number that it stays below."""

    @abstractmethod
    def to_rows(self, labels: SoftLabels, order: IdOrder) -> EntryRows:
        """The integers that ``labels`` are coded as."""

    @abstractmethod
    def to_labels(self, headers: Tensor, ids: Tensor, values: Tensor) -> Ragged:
        """Labels of decoded integers, on any device.

        Args:
            headers: (rows, header_fields) integers within ``header_limits``.
            ids: (entries,) int32, which their ranks stand for.
            values: (entries,) integers below ``value_limit``, or their ``levels`` where the codec has some.
        """

    # ---- options -------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        return {"coding": self.coding} | ({"shapes": self.prototypes.digest} if self.prototypes is not None else {})

    @classmethod
    def options(cls, config: Mapping[str, Any], read_asset: Callable[[str], bytes]) -> dict[str, Any]:
        if "shapes" not in config:
            return dict(config)
        if not isinstance(config["shapes"], str) or not DIGEST.fullmatch(config["shapes"]):
            raise ValueError(f"shapes must be a table's digest, 32 hexadecimal digits, got {config['shapes']!r:.60}")
        prototypes = PrototypeTable.from_bytes(read_asset(f"shapes-{config['shapes']}.safetensors"))
        if prototypes.digest != config["shapes"]:
            raise ValueError(f"the prototypes have the digest {prototypes.digest}, expected {config['shapes']}")
        others = {name: value for name, value in config.items() if name != "shapes"}
        return {**others, "prototypes": prototypes}

    def assets(self) -> dict[str, bytes]:
        return {} if self.prototypes is None else {self.prototypes.file_name: self.prototypes.to_bytes()}

    # ---- the model -----------------------------------------------------------------------------------------------

    def learn(self, labels: SoftLabels) -> bytes:
        classes = None
        if self.prototypes is None:
            labels = _ragged(labels)
            classes = id_classes(labels.ids.numpy(), labels.values.numpy(), self.vocab_size)
        rows = self.to_rows(labels, self._order_of(classes))
        counts = count_symbols(rows.headers, rows.ranks, rows.values, self.total)
        return pack_statistics(Statistics.of(counts, self.header_fields, classes))

    def use_model(self, model: bytes) -> None:
        if not self.learn_rows:  # rows coded without statistics
            super().use_model(model)
            return
        vocab_size = None if self.prototypes is not None else self.vocab_size
        self._statistics = unpack_statistics(model, self.header_fields, vocab_size)
        self._model = self._statistics.entry_model(self.header_fields, self.total)
        self.model = model
        for made in ("order", "order_table", "slots"):
            self.__dict__.pop(made, None)
        self._bounded = None

    @cached_property
    def orders(self) -> IdOrder:
        """The orders that are known without a model: the prototypes', or without those ascending ids."""
        if self.prototypes is not None:
            return self._prototype_order
        return _ascending(self.vocab_size)

    @cached_property
    def order(self) -> IdOrder:
        """The orders that ids are ranked by: one, or one per prototype."""
        if self.coding == "plain":
            return _ascending(self.vocab_size)
        return self._order_of(None if self.prototypes is not None else self._statistics.classes)

    def _order_of(self, classes: NDArray[np.uint8] | None) -> IdOrder:
        if self.prototypes is not None:
            return self._prototype_order
        assert classes is not None
        return IdOrder.by_class(classes)

    @cached_property
    def _prototype_order(self) -> IdOrder:
        assert self.prototypes is not None
        return IdOrder(self.prototypes.order)

    def check(self, labels: SoftLabels) -> None:
        _require_exact(self, labels)

    # ---- bytes ---------------------------------------------------------------------------------------------------

    @cached_property
    def _layout(self) -> RowLayout:
        """The bit layout of rows that are coded by themselves."""
        header, rank, value = self.field_widths
        return RowLayout(header, value, rank, self.coding == "rows")

    @property
    def field_widths(self) -> tuple[list[int], int, int]:
        """The bits of each header field, of a rank and of a value in rows that are coded by themselves."""
        whole = 8 if self.coding == "plain" else 1
        limits = (*self.header_limits, self.vocab_size, self.value_limit)
        *header, rank, value = (-(-(limit - 1).bit_length() // whole) * whole for limit in limits)
        return header, rank, value

    def encode(self, labels: SoftLabels) -> bytes:
        rows = self.to_rows(labels, self.order)
        coder = self._model if self.coding == "blocks" else self._layout
        return coder.encode(rows.headers, rows.ranks, rows.values)

    def locate(
        self, payload: NDArray[np.uint8], blocks: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        return locate_rows(payload, blocks, rows)

    def check_index(self, block: NDArray[np.uint8], rows: int) -> None:
        check_indexes(block, np.array([[0, len(block), rows]]))

    def decode(self, data: NDArray[np.uint8], units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels:
        if not len(units) and not len(wanted):
            return self.empty  # which takes no model: a shard without rows has none
        coder = self._model if self.coding == "blocks" else self._layout
        headers, ids, values = (torch.from_numpy(x) for x in coder.decode(data, units, self._bounds))
        labels = self.to_labels(headers, ids, values)
        return labels if np.array_equal(wanted, np.arange(len(headers))) else labels[torch.from_numpy(wanted)]

    def decode_on_device(self, data: Tensor, units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels | None:
        if not len(units) and self.learn_rows and not self.model:
            return None
        return entries_on_device.decode(self, data, units, wanted)

    # Tables that lie on a device as long as the codec does.

    @cached_property
    def slots(self) -> Tensor:
        """The lookup table of the GPU decoder of blocks."""
        from kdfast.kernels.decode_blocks import slots  # needs Triton, which is there when this is asked for

        return torch.from_numpy(slots(self._statistics.frequencies))

    @cached_property
    def order_table(self) -> Tensor:
        """(orders, vocabulary) int32: ids by rank."""
        return torch.from_numpy(self.order.ids)

    @cached_property
    def level_table(self) -> Tensor | None:
        """(value_limit,) float32: what values stand for; None: themselves."""
        return None if self.levels is None else torch.from_numpy(self.levels)

    @property
    def _bounds(self) -> RowBounds:
        if self._bounded is None:
            limits = (self.max_entries, self.header_limits, self.value_limit)
            self._bounded = RowBounds(*limits, self.order.ids, self.levels, self.total, self.remainder)
        return self._bounded


def _ragged(labels: SoftLabels) -> Ragged:
    if not isinstance(labels, Ragged):
        raise TypeError(f"labels must be of some entries per row, got {labels.kind}")
    return labels


def _ascending(vocab_size: int) -> IdOrder:
    return IdOrder(np.arange(vocab_size, dtype=np.int32)[None])


def by_rank(
    ids: NDArray[np.int32], counts: NDArray[np.int64], order: IdOrder, orders: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The permutation that sorts entries by rank within each row, and their ranks in that order."""
    rows = np.repeat(np.arange(len(counts)), counts)
    which = 0 if orders is None or len(order.ranks) == 1 else np.repeat(orders, counts)
    ranks: NDArray[np.int32] = order.ranks[which, ids]
    # One key, as ranks are below 2**24: np.lexsort takes several times as long.
    sort = np.argsort(rows << 24 | ranks, kind="stable")
    return sort, ranks[sort]


def _require_exact(codec: EntryCodec, labels: SoftLabels) -> None:
    """Raise ``ValueError`` unless ``codec`` stores ``labels``, of its kind and on the CPU, without changing a bit.

    The codec needs no model for this: it may not be learned yet.
    """
    labels = _ragged(labels)
    ids, counts = labels.ids.numpy(), labels.counts.numpy()
    _require_below("ids", ids, codec.vocab_size)
    _require_below("numbers of entries", counts, codec.max_entries + 1)
    if isinstance(labels, Prototype) and codec.prototypes is not None:
        _require_below("prototype", labels.prototype_ids.numpy(), len(codec.prototypes))
        if not same_table(labels.prototypes, codec.prototypes.table):
            raise ValueError(
                f"the labels refer to another table of prototypes than the codec's, {codec.prototypes.file_name}"
            )
    if not bool(labels.values.isfinite().all()):
        raise ValueError(f"{codec.name}: a value is not one that this codec gives: it is not finite")
    rows = codec.to_rows(labels, codec.orders)
    if (rows.headers < 0).any() or (rows.headers >= np.array(codec.header_limits)).any():
        raise ValueError(f"{codec.name}: a row is not one that this codec gives")
    count_symbols(rows.headers, rows.ranks, rows.values, codec.total)  # refuses a token twice and a wrong total
    which = np.repeat(rows.headers[:, 1], counts) if codec.prototypes is not None else np.zeros_like(rows.ranks)
    levels = rows.values if codec.levels is None else codec.levels[rows.values]
    numbers = (rows.headers, codec.orders.ids[which, rows.ranks], levels)
    back = codec.to_labels(*(torch.from_numpy(x) for x in numbers))
    ours, theirs = _by_id(ids, counts), _by_id(back.ids.numpy(), counts)
    if not torch.equal(labels.values[ours], back.values[theirs]):
        raise ValueError(f"{codec.name}: a value is not one that this codec gives")
    if isinstance(labels, Tailed) and isinstance(back, Tailed) and not torch.equal(labels.tails, back.tails):
        raise ValueError(f"{codec.name}: a tail is not one that this codec gives")


def _require_below(what: str, numbers: NDArray[np.int64] | NDArray[np.int32], limit: int) -> None:
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
        raise ValueError(f"{what} must lie in [0, {limit}), got {int(numbers.min())} to {int(numbers.max())}")


def _by_id(ids: NDArray[np.int32], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The permutation that sorts entries by id within each row."""
    order: NDArray[np.int64] = np.lexsort((ids, np.repeat(np.arange(len(counts)), counts)))
    return order
