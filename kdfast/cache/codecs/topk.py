"""``topk``: the K most likely tokens, and exactly how much probability the rest holds at each temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._C import first_bad_top
from kdfast.cache.codecs.base import Codec, FixedWidthCodec, require_kind
from kdfast.cache.codecs.ids import id_field, pack_ids, unpack_ids
from kdfast.cache.codecs.registry import register
from kdfast.cache.selection.select import missing, top
from kdfast.labels import Ragged, SoftLabels
from kdfast.labels import TopK as TopKLabels
from kdfast.labels.entries import offsets_of

__all__ = ["TopK"]

K = 16  # the default
VALUE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
ROUNDING = 1e-5  # in nats, of sums in float32
TINY = 1e-30  # of a row's mass: sums of less have terms that underflow


@register
class TopK(FixedWidthCodec):
    """Ids and log-probabilities at T = 1 of the k largest columns, and the log-mass of all others per temperature.

    A row is k ids (u16; 3 bytes above 65536 columns), k log-probabilities (``value_dtype``: float16, whose relative
    error is 2**-11, or float32) and one float32 tail per temperature: the log of the mass of all columns left out,
    summed column by column. Columns at -inf are never entries, nor are those whose log-probability overflows
    ``value_dtype``: these stay in the tail, so that the split of the row's mass remains exact.
    """

    name = "topk"
    kind = TopKLabels.kind

    def __init__(
        self, vocab_size: int, temperatures: Sequence[float], *, k: int = K, value_dtype: str = "float16"
    ) -> None:
        super().__init__(vocab_size, temperatures)
        if index(k) < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if value_dtype not in VALUE_DTYPES:
            raise ValueError(f"value_dtype must be one of {sorted(VALUE_DTYPES)}, got {value_dtype!r}")
        self.k = self.heads = min(index(k), self.vocab_size)
        self.value_dtype = value_dtype
        ids = id_field(self.vocab_size, (self.k,))
        values = np.dtype(value_dtype).newbyteorder("<")
        tails = ("<f4", (len(self.temperatures),))
        self.row_dtype = np.dtype([("ids", *ids), ("values", values, (self.k,)), ("tails", *tails)])

    def config(self) -> dict[str, Any]:
        return {"k": self.k, "value_dtype": self.value_dtype}

    @classmethod
    def narrowing(
        cls, source: Codec, temperatures: Sequence[float], options: Mapping[str, Any]
    ) -> Callable[[SoftLabels], Ragged]:
        k = options.get("k", K)
        if not isinstance(source, TopK) or source.kind != cls.kind:
            return super().narrowing(source, temperatures, options)
        missing = [t for t in temperatures if t not in source.temperatures]
        if missing:
            raise ValueError(f"holds tails for temperatures {source.temperatures}, not for {missing}")
        if k > source.k:
            raise ValueError(f"holds at most {source.k} entries per row, k={k} are wanted")
        return partial(_narrow, temperatures=temperatures, k=k)

    def select(self, logits: Tensor, key: bytes) -> TopKLabels:
        logits = logits.detach()
        likeliest = top(logits, temperature=1.0, k=self.k)
        ids = likeliest.ids.long()
        entries = logits.gather(1, ids).double().masked_fill(missing(logits, likeliest), -torch.inf)
        log_probs = (entries - entries[:, :1] + likeliest.probs[:, :1].log()).float()
        kept = log_probs.to(VALUE_DTYPES[self.value_dtype]).isfinite()
        rests = [likeliest.rest if t == 1.0 else top(logits, temperature=t, k=self.k).rest for t in self.temperatures]
        # A tail has what the stored type cannot hold, too.
        cut = (entries > -torch.inf).ne(kept).any(1)
        columns = ids.where(kept, -1)
        tails = torch.stack(
            [_tail(logits, columns, rest, t, cut) for rest, t in zip(rests, self.temperatures, strict=True)]
        )
        return TopKLabels(
            vocab_size=self.vocab_size,
            values=log_probs[kept],
            temperatures=self.temperatures,
            ids=ids[kept].int(),
            offsets=offsets_of(kept.sum(1)),
            tails=tails.float(),
        )

    def encode(self, labels: SoftLabels) -> bytes:
        labels = _largest_first(require_kind(labels, TopKLabels))
        most = int(labels.counts.max()) if len(labels) else 0
        if most > self.k:
            raise ValueError(f"a row has {most} entries, and codec 'topk' stores k={self.k}")
        out = np.zeros(len(labels), self.row_dtype)
        filled = np.arange(self.k) < labels.counts.numpy()[:, None]
        ids = np.zeros(filled.shape, "<u4")
        ids[filled] = labels.ids.numpy()
        out["values"] = -np.inf  # marks the entries that a short row lacks
        with np.errstate(over="ignore"):  # of what the type cannot hold there is no entry
            out["values"][filled] = _at_most_0(labels.values).numpy()
        ids[np.isneginf(out["values"])] = 0
        out["ids"] = pack_ids(ids, self.vocab_size)
        out["tails"] = _at_most_0(labels.tails).numpy().T
        return out.tobytes()

    def unpack(self, packed: NDArray[Any]) -> TopKLabels:
        # A copy, side by side and aligned, which PyTorch converts several times as fast as NumPy does.
        values = torch.from_numpy(np.array(packed["values"], order="C")).float().numpy()
        ids, kept = unpack_ids(packed["ids"], self.vocab_size), values > -np.inf
        bad = first_bad_top(ids, values, self.vocab_size)
        if not (packed["tails"] <= 0).all() or (bad >= 0 and not (values[bad] <= 0).all()):  # NaN included
            raise ValueError("a log-probability or a tail is not in [-inf, 0]")
        if bad >= 0:
            raise ValueError("a row's entries are not in order, the largest first, or two of them have one id")
        width = self.k if kept.all() else None  # no row is short, which a loss makes use of
        if width is None and (~kept[:, 0] & np.isneginf(packed["tails"]).any(1)).any():
            raise ValueError("a row has no probability anywhere")
        counts = kept.sum(1) if width is None else np.full(len(kept), width)
        return TopKLabels(
            vocab_size=self.vocab_size,
            values=torch.from_numpy(values[kept] if width is None else values.reshape(-1)),
            temperatures=self.temperatures,
            ids=torch.from_numpy(ids[kept] if width is None else ids.reshape(-1)),
            offsets=offsets_of(torch.from_numpy(counts)),
            width=width,
            tails=torch.from_numpy(packed["tails"].T.astype(np.float32, order="C")),
        )


def _tail(logits: Tensor, ids: Tensor, rest: Tensor, temperature: float, cut: Tensor) -> Tensor:
    """(rows,): the log of the mass beside the columns ``ids``.

    That is ``rest``, unless it has lost its digits, or the row is ``cut``: it keeps fewer columns than ``rest`` left.
    """
    tails = rest.log()
    rows = ((rest < TINY) | cut).nonzero()[:, 0]
    if rows.numel():
        z, entries = logits[rows].double() / temperature, ids[rows]
        inside = torch.zeros_like(z).scatter_add(1, entries.clamp(min=0), (entries >= 0).double())
        tails[rows] = z.masked_fill(inside > 0, -torch.inf).logsumexp(1) - z.logsumexp(1)
    return tails


def _at_most_0(logs: Tensor) -> Tensor:
    """Logarithms of masses, without what rounding has added to 1."""
    return logs.masked_fill((logs > 0) & (logs < ROUNDING), 0.0)


def _largest_first(labels: TopKLabels) -> TopKLabels:
    """``labels`` with each row's entries in order. Those of a teacher are; what comes from elsewhere may not be."""
    values, row = labels.values.float(), labels.entry_rows
    if bool(((values[1:] <= values[:-1]) | (row[1:] > row[:-1])).all()):
        return labels
    order = torch.from_numpy(np.lexsort((-values.numpy(), row.numpy())))
    return replace(labels, ids=labels.ids[order], values=labels.values[order])


def _narrow(labels: SoftLabels, *, temperatures: Sequence[float], k: int) -> TopKLabels:
    """The ``k`` largest entries of each row, the mass of its others added to the tails at ``temperatures``."""
    labels = require_kind(labels, TopKLabels)
    row = labels.entry_rows
    rest = torch.arange(len(row)) - labels.offsets[row] >= k
    tails = labels.tails[[labels.temperatures.index(t) for t in temperatures]].double()
    for tail, temperature in zip(tails, temperatures, strict=True):
        weights = labels.at(temperature)[0].double()
        dropped = torch.zeros_like(tail).index_add(0, row[rest], weights[rest])
        torch.logaddexp(tail, dropped.log(), out=tail)
    return replace(
        labels,
        ids=labels.ids[~rest],
        values=labels.values[~rest],
        tails=tails.float(),
        temperatures=tuple(temperatures),
        offsets=offsets_of(labels.counts.clamp(max=k)),
        width=None,
    )
