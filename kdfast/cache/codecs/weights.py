"""``sample`` and ``threshold``: unbiased draws from the teacher's distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, log2
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
from kdfast.cache.selection.select import Top, record_seed, sample, threshold
from kdfast.labels import SoftLabels, Weights
from kdfast.labels.entries import offsets_of
from kdfast.labels.ragged import same_table, table_on

__all__ = ["Sample", "Threshold", "WeightCodec"]

DRAWS, TAU = 50, 0.02  # defaults
CHUNK = 512  # rows at a time
SAMPLINGS = ("systematic", "independent")


class WeightCodec(EntryCodec):
    """Base of the codecs of weights: entries whose weight is ``levels[v]``, out of a fixed table, for a value v."""

    kind = Weights.kind
    drawn = True
    levels: NDArray[np.float32]

    @property
    def header_fields(self) -> int:  # type: ignore[override]
        return 1 + (self.prototypes is not None)

    @property
    def value_limit(self) -> int:  # type: ignore[override]
        return len(self.levels)

    @property
    def header_limits(self) -> tuple[int, ...]:
        return (self.max_entries + 1, *(() if self.prototypes is None else (len(self.prototypes),)))

    @classmethod
    def learns_first(cls, options: Mapping[str, Any], files: Files) -> bool:
        return options.get("prototypes") is not None and needs_table(options, files)

    @classmethod
    def prepare(cls, options: Mapping[str, Any], source: CaptureSource) -> dict[str, Any]:
        return dict(options) if options.get("prototypes") is None else with_table(options, source, entries=0)

    def to_rows(self, labels: SoftLabels, order: IdOrder) -> EntryRows:
        labels = require_kind(labels, Weights)
        ids, counts = labels.ids.numpy(), labels.counts.numpy()
        header, prototype = [counts], None
        if self.prototypes is not None:
            prototype = self._known(labels)
            if prototype is None:
                prototype = self._nearest(ids, counts)
            header.append(prototype)
        sort, ranks = by_rank(ids, counts, order, prototype)
        values = self._value(labels.values.numpy()[sort])
        if (self.levels[values] != labels.values.numpy()[sort]).any():
            raise ValueError(f"{self.name}: a weight is not one that this codec gives")
        return EntryRows(np.stack(header, 1).astype(np.int32), ranks, values)

    def _known(self, labels: Weights) -> NDArray[np.int64] | None:
        """(rows,): the labels' own prototypes, if they are of this table."""
        if labels.prototype_ids is None or labels.prototypes is None or self.prototypes is None:
            return None
        if not same_table(labels.prototypes, self.prototypes.table):
            return None
        return labels.prototype_ids.numpy()

    def _nearest(self, ids: NDArray[np.int32], counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows,): the prototype that finds a row's ids the likeliest, of labels that come without their rows."""
        assert self.prototypes is not None
        totals = np.zeros((len(counts), len(self.prototypes)), np.int32)
        first = counts.cumsum() - counts
        for t in range(int(counts.max(initial=0))):  # the t-th ids of all rows: far faster than np.add.reduceat
            rows = np.flatnonzero(counts > t)
            totals[rows] += self._codes_by_id[ids[first[rows] + t]]
        return totals.argmin(1)

    @property
    def _codes_by_id(self) -> NDArray[np.uint8]:
        if not hasattr(self, "_transposed"):
            assert self.prototypes is not None
            self._transposed = np.ascontiguousarray(self.prototypes.codes.T)
        return self._transposed

    def to_labels(self, headers: Tensor, ids: Tensor, values: Tensor) -> Weights:
        return self._labels(ids, values, headers[:, 0], None if self.prototypes is None else headers[:, 1].long())

    def _selected(self, logits: Tensor, ids: Tensor, weights: Tensor, counts: Tensor) -> Weights:
        """The labels of columns that were just chosen, with the prototypes closest to the whole rows."""
        if self.prototypes is None:
            return self._labels(ids, weights, counts, None)
        chunks, numbers = torch.split(logits.detach(), CHUNK), []
        for i, chunk in enumerate(chunks):
            none = chunk.new_empty((len(chunk), 0), dtype=torch.int32)
            rest = torch.ones(len(chunk), dtype=torch.float64, device=chunk.device)
            whole = Top(none, none.double(), rest, rest.float())  # no entries: a prototype stands for the whole row
            numbers.append(self.prototypes.assign_rows(chunk, self.temperatures[0], CHUNK * i, whole))
        return self._labels(ids, weights, counts, torch.cat(numbers) if numbers else counts.long())

    def _labels(self, ids: Tensor, weights: Tensor, counts: Tensor, prototype_ids: Tensor | None) -> Weights:
        return Weights(
            vocab_size=self.vocab_size,
            values=weights,
            temperatures=self.temperatures,
            ids=ids,
            offsets=offsets_of(counts.long()),
            prototype_ids=prototype_ids,
            prototypes=None if self.prototypes is None else table_on(self.prototypes.table, ids.device),
        )

    def _value(self, weights: NDArray[np.float32]) -> NDArray[np.int32]:
        """The nearest level's number. Levels do not ascend: they are sorted here."""
        order = np.argsort(self.levels)
        ascending = self.levels[order]
        at = np.searchsorted(ascending, weights).clip(1, max(1, len(ascending) - 1)) if len(ascending) > 1 else 0
        if len(ascending) > 1:
            at = at - (weights - ascending[at - 1] < ascending[at] - weights)
        return order[at * np.ones_like(weights, np.int64)].astype(np.int32)


@register
class Sample(WeightCodec):
    """N draws with replacement from the teacher's distribution: weights are how often an id was drawn, over N.

    E[weight] = p, so that the gradient of the cross-entropy is right on average ("Sparse Logit Sampling", ACL 2025).
    Draws are a function of (seed, key, row) alone.

    Args:
        draws: N.
        sampling: "systematic": the draws lie at equal distances along the cumulative probabilities, moved by one
            random offset, so that a weight is p rounded up or down to a multiple of 1 / N ("systematic resampling",
            Kitagawa 1996). "independent": each draw for itself, as caches were written before 0.2, whose weights have
            the variance p (1 - p) / N: the same bytes, and twice to three times the noise.
        seed: of the draws.
    """

    name = "sample"

    def __init__(
        self,
        vocab_size: int,
        temperatures: Sequence[float],
        *,
        draws: int = DRAWS,
        sampling: str = SAMPLINGS[0],
        seed: int = 0,
        coding: str = "blocks",
        prototypes: PrototypeTable | None = None,
    ) -> None:
        super().__init__(vocab_size, temperatures, coding=coding, prototypes=prototypes)
        if not 1 <= index(draws) < 2**17:
            raise ValueError(f"draws must lie in [1, 2**17), got {draws}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {SAMPLINGS}, got {sampling!r}")
        self.draws, self.sampling, self.seed = index(draws), sampling, index(seed)
        self.total = self.draws
        self.noise = f"the noise of {self.draws} draws a row"
        self.max_entries = min(self.draws, self.vocab_size)
        self.levels = (np.arange(1, self.draws + 1) / self.draws).astype(np.float32)

    def config(self) -> dict[str, Any]:
        named = {} if self.sampling == "independent" else {"sampling": self.sampling}
        return {"draws": self.draws, "seed": self.seed, **named, **super().config()}

    @classmethod
    def options(cls, config: Mapping[str, Any], read_asset: Callable[[str], bytes]) -> dict[str, Any]:
        # A cache that does not say so was written when all draws were independent.
        return {"sampling": "independent", **super().options(config, read_asset)}

    @classmethod
    def refined(cls, options: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        # N draws times E are E times N draws put together.
        return {**options, "draws": options.get("draws", DRAWS) * epochs}

    def select(self, logits: Tensor, key: bytes) -> Weights:
        drawn = sample(
            logits,
            temperature=self.temperatures[0],
            draws=self.draws,
            systematic=self.sampling == "systematic",
            seed=record_seed(self.seed, key),
        )
        levels = torch.from_numpy(self.levels).to(logits.device)
        return self._selected(logits, drawn.ids, levels[drawn.draws.long() - 1], drawn.counts)


@register
class Threshold(WeightCodec):
    """Every probability above tau, and of the others each with probability p / tau, at the value tau.

    Systematic sampling keeps at most ``ceil(1 / tau) + 1`` entries. Probabilities above tau are rounded to a grid of
    ``steps`` levels per octave at random, so that their expectation stays.

    Args:
        tau: the threshold. The relative variance of a rare id's weight is tau.
        steps: levels per octave.
    """

    name = "threshold"

    def __init__(
        self,
        vocab_size: int,
        temperatures: Sequence[float],
        *,
        tau: float = TAU,
        steps: int = 8,
        seed: int = 0,
        coding: str = "blocks",
        prototypes: PrototypeTable | None = None,
    ) -> None:
        super().__init__(vocab_size, temperatures, coding=coding, prototypes=prototypes)
        if not 2**-16 <= tau <= 1:
            raise ValueError(f"tau must lie in [2**-16, 1], got {tau}")
        if not 1 <= index(steps) <= 1024:
            raise ValueError(f"steps must lie in [1, 1024], got {steps}")
        self.tau, self.steps, self.seed = float(tau), index(steps), index(seed)
        self.noise = f"the noise of draws below {self.tau:g}"
        self.max_entries = min(ceil(1 / self.tau) + 1, self.vocab_size)
        grid = 2.0 ** (-np.arange(ceil(self.steps * log2(1 / self.tau)) + 1) / self.steps)
        # One level more than tau = 1 needs, so that there is always one below and one above.
        self.levels = np.concatenate([[self.tau], grid if len(grid) > 1 else [1.0, 0.5]]).astype(np.float32)

    def config(self) -> dict[str, Any]:
        return {"tau": self.tau, "steps": self.steps, "seed": self.seed, **super().config()}

    @classmethod
    def refined(cls, options: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        # A threshold tau has variance p (tau - p) where p < tau, and tau / E less than an E-th of it.
        return {**options, "tau": options.get("tau", TAU) / epochs}

    def select(self, logits: Tensor, key: bytes) -> Weights:
        seed = record_seed(self.seed, key)
        kept = threshold(logits, temperature=self.temperatures[0], tau=self.tau, seed=seed)
        weights = torch.from_numpy(self._round(kept.probs.cpu().numpy(), seed)).to(kept.ids.device)
        return self._selected(logits, kept.ids, weights, kept.counts)

    def _round(self, probs: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
        """Round at random to the level above or below, so that the expectation is ``probs``; tau itself is a level."""
        ascending = self.levels[:0:-1].astype(np.float64)
        above = np.searchsorted(ascending, probs).clip(1, len(ascending) - 1)
        low, high = ascending[above - 1], ascending[above]
        uniform = np.random.Generator(np.random.Philox(key=seed % 2**64)).random(len(probs))
        up = (probs - low) / (high - low) > uniform
        return np.where(probs == self.levels[0], self.levels[0], np.where(up, high, low)).astype(np.float32)
