"""``scored``: draws from the teacher's distribution with its log-probabilities, which a KL is measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import require_kind
from kdfast.cache.codecs.entries import EntryCodec, EntryRows, by_rank
from kdfast.cache.codecs.model import IdOrder
from kdfast.cache.codecs.registry import register
from kdfast.cache.selection.select import record_seed, sample
from kdfast.labels import SoftLabels, Weights
from kdfast.labels.entries import offsets_of, rows_of_entries
from kdfast.labels.ragged import table_on

__all__ = ["Scored"]

DRAWS = 23  # the default
MOST_DRAWS = 256  # so many that the rounding of a log-probability moves N p by less than a draw
STEP = 2.0**-10  # nats, of a log-probability: rounding adds 4e-8 nats to a mean KL
CODES = 2**15  # down to -32 nats
OFFSETS = 4  # how often an id was drawn is N p rounded down, less 1, and up to 3 more


@register
class Scored(EntryCodec):
    """N systematic draws, as ``sample`` makes them, with the teacher's log-probability of each id that was drawn.

    From these the KL of any model from the teacher is estimated without bias (``kdfast.meter``). The likeliest id is
    always among the entries, with weight 0 where it was not drawn. A student trains on them as on ``sample``'s.

    Args:
        draws: N, at most 256.
        seed: of the draws, which are a function of (seed, key, row) alone.
    """

    name = "scored"
    kind = Weights.kind
    drawn = True
    header_fields = 1
    value_limit = CODES * OFFSETS

    def __init__(
        self,
        vocab_size: int,
        temperatures: Sequence[float],
        *,
        draws: int = DRAWS,
        seed: int = 0,
        coding: str = "blocks",
    ) -> None:
        if coding == "plain":
            raise ValueError(
                'coding must be "blocks" or "rows": its numbers do not fit into the whole bytes of "plain"'
            )
        super().__init__(vocab_size, temperatures, coding=coding)
        if not 1 <= index(draws) <= MOST_DRAWS:
            raise ValueError(f"draws must lie in [1, {MOST_DRAWS}], got {draws}")
        self.draws, self.seed = index(draws), index(seed)
        self.max_entries = min(self.draws + 1, self.vocab_size)
        self.noise = f"the noise of {self.draws} draws a row"
        # How often an id of each code is drawn at least, where its log-probability was not rounded.
        self._least = torch.from_numpy(np.floor(self.draws * np.exp(-STEP * np.arange(CODES)))).long()

    @property
    def header_limits(self) -> tuple[int, ...]:
        return (self.max_entries + 1,)

    def config(self) -> dict[str, Any]:
        return {"draws": self.draws, "seed": self.seed, **super().config()}

    @classmethod
    def refined(cls, options: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        return {**options, "draws": min(MOST_DRAWS, options.get("draws", DRAWS) * epochs)}

    def select(self, logits: Tensor, key: bytes) -> Weights:
        temperature = self.temperatures[0]
        drawn = sample(
            logits, temperature=temperature, draws=self.draws, systematic=True, seed=record_seed(self.seed, key)
        )
        row = rows_of_entries(offsets_of(drawn.counts.long()), drawn.ids.numel())
        best = logits.argmax(1) if len(logits) else drawn.counts.long()
        found = torch.zeros_like(best, dtype=torch.bool)
        found[row[drawn.ids == best[row]]] = True
        missing = (~found).nonzero()[:, 0]
        row, ids = torch.cat([row, missing]), torch.cat([drawn.ids, best[missing].int()])
        order = (row * self.vocab_size + ids).argsort()
        row, ids = row[order], ids[order]
        draws = torch.cat([drawn.draws, torch.zeros_like(missing, dtype=torch.int32)])[order]
        log_probs = logits[row, ids.long()].double() / temperature - drawn.lse.double()[row]
        code = (log_probs / -STEP).round().clamp(0, CODES - 1)
        return self._labels(ids, draws, code, torch.bincount(row, minlength=len(logits)))

    def _labels(self, ids: Tensor, draws: Tensor, code: Tensor, counts: Tensor) -> Weights:
        return Weights(
            vocab_size=self.vocab_size,
            values=draws.float() / self.draws,
            temperatures=self.temperatures,
            ids=ids,
            offsets=offsets_of(counts.long()),
            log_probs=(code * -STEP).float(),
        )

    def to_rows(self, labels: SoftLabels, order: IdOrder) -> EntryRows:
        labels = require_kind(labels, Weights)
        if labels.log_probs is None:
            raise ValueError(f"{self.name}: weights without the teacher's log-probabilities, log_probs")
        ids, counts = labels.ids.numpy(), labels.counts.numpy()
        sort, ranks = by_rank(ids, counts, order, None)
        log_probs = labels.log_probs.numpy()[sort]
        code = np.rint(np.nan_to_num(log_probs / -STEP, nan=-1.0, posinf=-1.0, neginf=-1.0)).astype(np.int64)
        draws = np.rint(labels.values.numpy()[sort] * self.draws).astype(np.int64)
        exact = (code * np.float32(-STEP)).astype(np.float32) == log_probs
        if len(code) and not (exact.all() and 0 <= code.min() <= code.max() < CODES):
            raise ValueError(f"{self.name}: a log-probability is not one that this codec gives")
        offset = draws - self._least.numpy()[code] + 1
        if len(offset) and not 0 <= offset.min() <= offset.max() < OFFSETS:
            raise ValueError(f"{self.name}: a weight is not one that this codec gives")
        return EntryRows(counts[:, None].astype(np.int32), ranks, (code * OFFSETS + offset).astype(np.int32))

    def to_labels(self, headers: Tensor, ids: Tensor, values: Tensor) -> Weights:
        code = values.long() // OFFSETS
        draws = table_on(self._least, code.device)[code] + values.long() % OFFSETS - 1
        labels = self._labels(ids, draws, code, headers[:, 0])
        if draws.device.type == "cpu":
            self._check(draws.numpy(), labels.counts.numpy())
        return labels

    def _check(self, draws: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Raise ``ValueError`` unless each row has N draws, none of them negative."""
        sums = np.bincount(np.repeat(np.arange(len(counts)), counts), draws, len(counts))
        if (draws < 0).any() or (sums != self.draws).any():
            raise ValueError(f"a row's draws do not add up to {self.draws}")
