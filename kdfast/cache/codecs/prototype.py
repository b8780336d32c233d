"""``prototype``: the likeliest ids exactly, and for all others one of a table's typical distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import CaptureSource, Files, require_kind
from kdfast.cache.codecs.entries import EntryCodec, EntryRows, by_rank
from kdfast.cache.codecs.learned_table import needs_table, with_table
from kdfast.cache.codecs.model import IdOrder
from kdfast.cache.codecs.registry import register
from kdfast.cache.selection.prototypes import PrototypeTable
from kdfast.cache.selection.select import missing, top
from kdfast.labels import Prototype as PrototypeLabels
from kdfast.labels import SoftLabels
from kdfast.labels.entries import offsets_of
from kdfast.labels.ragged import table_on

__all__ = ["Prototype"]

K = 3  # the default
CHUNK = 512  # rows at a time
REACH = 12.0  # logits of shares and tails are cut to [-REACH, REACH] nats


@register
class Prototype(EntryCodec):
    """The k likeliest ids, the mass of all others, and the number of the prototype that these are closest to.

    The label is a distribution over the whole vocabulary: the entries, and ``tail mass * prototype`` on the rest. The
    prototype is the one whose label is closest to the row in forward KL. Probabilities are rounded: the tail as a
    logit, the entries as logits of their shares in what the entries before them leave.

    It is another distribution than the row, some tenths of a nat away: the floor of ``CacheInfo``. Students that stay
    farther from their teacher learn from it as from whole rows; one that is nearer is pulled away.

    A capture may be given a number in place of the table, or neither: it then takes the table that the cache holds
    already, or learns one from its first 65,536 rows, over which the teacher runs three times more. After that the
    table is frozen. Several writers of one cache need one table: learn it first.

    Args:
        prototypes: the table, of ``kdfast.cache.learn_prototypes``.
        k: entries per row; 0: the prototype alone.
        tail_step: resolution of the tail mass, in nats of its logit.
        share_step: resolution of the entries, likewise.
    """

    name = "prototype"
    kind = PrototypeLabels.kind
    prototypes: PrototypeTable
    header_fields = 3

    def __init__(
        self,
        vocab_size: int,
        temperatures: Sequence[float],
        *,
        prototypes: PrototypeTable,
        k: int = K,
        tail_step: float = 0.5,
        share_step: float = 0.5,
        coding: str = "blocks",
    ) -> None:
        if not isinstance(prototypes, PrototypeTable):
            raise TypeError(f"prototypes must be a kdfast.cache.PrototypeTable, got {type(prototypes).__name__}")
        super().__init__(vocab_size, temperatures, coding=coding, prototypes=prototypes)
        if index(k) < 0:
            raise ValueError(f"k must not be negative, got {k}")
        if not (1e-3 <= tail_step <= 2 and 1e-3 <= share_step <= 2):
            raise ValueError(f"steps must lie in [0.001, 2] nats, got {tail_step} and {share_step}")
        self.k = self.max_entries = min(index(k), self.vocab_size)
        self.tail_step, self.share_step = float(tail_step), float(share_step)
        self._tails, self._shares = _grid(self.tail_step), _grid(self.share_step)
        self._share, self._rest = (torch.from_numpy(_sigmoid(x)) for x in (self._shares, -self._shares))
        tails = np.append(self._tails, -np.inf)
        self._head = torch.from_numpy(_sigmoid(-tails))
        self._log_tail = torch.from_numpy((tails - np.logaddexp(0, tails)).astype(np.float32))
        self.value_limit = len(self._shares)
        self.remainder = len(self._tails) - 1  # the largest tail: all of the mass

    @property
    def header_limits(self) -> tuple[int, ...]:
        return (self.k + 1, len(self.prototypes), len(self._tails) + 1)  # the last tail code: there is none

    def config(self) -> dict[str, Any]:
        return {"k": self.k, "tail_step": self.tail_step, "share_step": self.share_step, **super().config()}

    @classmethod
    def learns_first(cls, options: Mapping[str, Any], files: Files) -> bool:
        return needs_table(options, files)

    @classmethod
    def prepare(cls, options: Mapping[str, Any], source: CaptureSource) -> dict[str, Any]:
        return with_table(options, source, options.get("k", K))

    def select(self, logits: Tensor, key: bytes) -> SoftLabels:
        chunks = torch.split(logits.detach(), CHUNK)
        return SoftLabels.cat([self._select(chunk, CHUNK * i) for i, chunk in enumerate(chunks)])

    def _select(self, logits: Tensor, first_row: int) -> PrototypeLabels:
        likeliest = top(logits, temperature=self.temperatures[0], k=self.k)
        prototype = self.prototypes.assign_rows(logits, self.temperatures[0], first_row, likeliest).cpu().numpy()
        probs = likeliest.probs.cpu().numpy()
        kept = ~missing(logits, likeliest).cpu().numpy()  # a masked column is no entry
        counts = kept.sum(1)
        flat, mass = likeliest.ids.cpu().numpy()[kept], probs[kept]
        sort, _ = by_rank(flat, counts, self.order, prototype)
        # So much below the others an entry would be rounded away, and the product of many such shares underflow.
        floor = np.repeat(_sums(mass, counts), counts) * np.exp(-REACH)
        values = _nearest(self._shares, _logits_of_shares(np.maximum(mass, floor)[sort], counts), _last(counts))
        tail = self._tail_code(likeliest.rest.cpu().numpy(), mass, counts)
        headers = np.stack([counts, prototype, tail], 1).astype(np.int32)
        return self.to_labels(*(torch.from_numpy(x) for x in (headers, flat[sort], values)))

    def _tail_code(self, tail: NDArray[np.float64], mass: NDArray[np.float64], counts: NDArray[np.int64]) -> Any:
        head = _sums(mass, counts)
        with np.errstate(divide="ignore"):
            code = _nearest(self._tails, np.log(tail) - np.log(head), np.zeros(len(tail), bool))
        return np.where(tail > 0, code, len(self._tails))

    def to_rows(self, labels: SoftLabels, order: IdOrder) -> EntryRows:
        labels = require_kind(labels, PrototypeLabels)
        ids, counts = labels.ids.numpy(), labels.counts.numpy()
        prototype = labels.prototype_ids.numpy()
        sort, ranks = by_rank(ids, counts, order, prototype)
        mass = labels.values.double().numpy()[sort]
        values = _nearest(self._shares, _logits_of_shares(mass, counts), _last(counts))
        log_tail = labels.tails[0].double().numpy()
        code = self._tail_code(np.exp(log_tail), mass, counts)
        return EntryRows(np.stack([counts, prototype, code], 1).astype(np.int32), ranks, values)

    def to_labels(self, headers: Tensor, ids: Tensor, values: Tensor) -> PrototypeLabels:
        counts, tail = headers[:, 0].long(), headers[:, 2].long()
        log_tail = self._on(ids, self._log_tail)[tail].masked_fill(counts == 0, 0.0)
        return PrototypeLabels(
            vocab_size=self.vocab_size,
            values=self._probs(self._on(ids, self._head)[tail], values, counts),
            temperatures=self.temperatures,
            ids=ids,
            offsets=offsets_of(counts),
            tails=log_tail[None],
            prototype_ids=headers[:, 1].long(),
            prototypes=self._on(ids, self.prototypes.table),
        )

    def _probs(self, left: Tensor, values: Tensor, counts: Tensor) -> Tensor:
        """Entries take their shares of what is left of their row, one after another; the last one takes it all."""
        share, rest = self._on(values, self._share), self._on(values, self._rest)
        first = counts.cumsum(0) - counts
        probs = torch.empty(len(values) + 1, dtype=torch.float32, device=values.device)
        host = values.device.type == "cpu"
        for t in range(min(self.k, len(values))):
            if host and t > 3 and t & (t - 1) == 0:  # now and then the rows without more entries are left out
                more_rows = counts > t
                left, counts, first = left[more_rows], counts[more_rows], first[more_rows]
                if not len(counts):
                    break
            # Where a row has no such entry, the last place takes what belongs nowhere.
            at = torch.where(counts > t, first + t, len(values))
            value = values[at.clamp(max=len(values) - 1)].long()
            more = counts > t + 1
            probs.scatter_(0, at, torch.where(more, left * share[value], left).float())
            left = left * torch.where(more, rest[value], 1.0)
        return probs[:-1]

    @staticmethod
    def _on(other: Tensor, table: Tensor) -> Tensor:
        return table_on(table, other.device)


def _grid(step: float) -> NDArray[np.float64]:
    """The grid of logits from -REACH to REACH, ``step`` apart."""
    half = int(REACH / step)
    return np.arange(-half, half + 1).astype(np.float64) * step


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    y: NDArray[np.float64] = np.exp(-np.logaddexp(0, -x))
    return y


def _nearest(grid: NDArray[np.float64], logits: NDArray[np.float64], fixed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The nearest grid points' numbers; 0 where ``fixed``."""
    step = grid[1] - grid[0]
    number = np.rint(np.where(fixed, grid[0], logits).clip(grid[0], grid[-1]) / step) - round(grid[0] / step)
    return number.astype(np.int32)


def _last(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(entries,) bool: which entries are the last of their rows."""
    last = np.zeros(int(counts.sum()), bool)
    last[counts.cumsum()[counts > 0] - 1] = True
    return last


def _sums(mass: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    sums = np.zeros(len(counts))
    np.add.at(sums, np.repeat(np.arange(len(counts)), counts), mass)
    return sums


def _logits_of_shares(mass: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per entry: the logit of its share in its mass and that of the entries after it."""
    from_end = mass[::-1].cumsum()[::-1]  # of all entries from this one to the end of the block
    after_row = np.append(from_end, 0.0)[counts.cumsum()]
    after = np.append(from_end, 0.0)[1:] - np.repeat(after_row, counts)
    with np.errstate(divide="ignore"):
        logits: NDArray[np.float64] = np.log(mass) - np.log(after.clip(min=1e-300))
    return logits
