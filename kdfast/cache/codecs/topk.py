"""``topk``: the K most likely tokens, and exactly how much probability the rest holds at each temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import Codec, FixedWidthCodec
from kdfast.cache.codecs.ids import id_field, pack_ids, unpack_ids
from kdfast.cache.codecs.registry import register
from kdfast.cache.selection.select import top
from kdfast.labels import SoftLabels

__all__ = ["TopK"]

K = 16  # the default
VALUE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
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
    kind = "topk"

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
    ) -> Callable[[SoftLabels], SoftLabels]:
        k = options.get("k", K)
        if not isinstance(source, TopK) or source.kind != cls.kind:
            return super().narrowing(source, temperatures, options)
        missing = [t for t in temperatures if t not in source.temperatures]
        if missing:
            raise ValueError(f"holds tails for temperatures {source.temperatures}, not for {missing}")
        if k > source.k:
            raise ValueError(f"holds at most {source.k} entries per row, k={k} are wanted")
        return partial(_narrow, temperatures=temperatures, k=k)

    def select(self, logits: Tensor, key: bytes) -> SoftLabels:
        logits = logits.detach()
        likeliest = top(logits, temperature=1.0, k=self.k)
        ids, lost = likeliest.ids.long(), likeliest.probs[:, -1] == 0.0
        if bool(lost.any()):  # columns whose probability underflows are columns still
            ids[lost] = logits[lost].topk(self.k, dim=1).indices
        entries = logits.gather(1, ids).double()
        log_probs = (entries - entries[:, :1] + likeliest.probs[:, :1].log()).float()
        kept = log_probs.to(VALUE_DTYPES[self.value_dtype]).isfinite()
        rests = [likeliest.rest if t == 1.0 else top(logits, temperature=t, k=self.k).rest for t in self.temperatures]
        columns = ids.where(kept, -1)
        tails = torch.stack([_tail(logits, columns, rest, t) for rest, t in zip(rests, self.temperatures, strict=True)])
        offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        return SoftLabels.topk(
            ids[kept],
            log_probs[kept],
            tails,
            vocab_size=self.vocab_size,
            temperatures=self.temperatures,
            offsets=offsets,
        )

    def encode(self, labels: SoftLabels) -> bytes:
        assert labels.ids is not None
        assert labels.offsets is not None
        assert labels.tails is not None
        out = np.zeros(len(labels), self.row_dtype)
        filled = np.arange(self.k) < np.diff(labels.offsets.numpy())[:, None]
        ids = np.zeros(filled.shape, "<u4")
        ids[filled] = labels.ids.numpy()
        out["ids"] = pack_ids(ids, self.vocab_size)
        out["values"] = -np.inf  # marks the entries that a short row lacks
        out["values"][filled] = labels.values.numpy()
        out["tails"] = labels.tails.numpy().T
        return out.tobytes()

    def unpack(self, packed: NDArray[Any]) -> SoftLabels:
        values = packed["values"].astype(np.float32)
        if not ((values <= 0).all() and (packed["tails"] <= 0).all()):  # NaN included
            raise ValueError("a log-probability or a tail is not in [-inf, 0]")
        ids, offsets = unpack_ids(packed["ids"], self.vocab_size), None
        kept = values > -np.inf
        if not kept.all():  # else (rows, k) tells SoftLabels that no row is short, which a loss makes use of
            ids, values = ids[kept], values[kept]
            offsets = np.zeros(len(packed) + 1, np.int64)
            np.cumsum(kept.sum(1), out=offsets[1:])
        return SoftLabels.topk(
            torch.from_numpy(ids),
            torch.from_numpy(values),
            torch.from_numpy(packed["tails"].T.astype(np.float32, order="C")),
            vocab_size=self.vocab_size,
            temperatures=self.temperatures,
            offsets=None if offsets is None else torch.from_numpy(offsets),
        )


def _tail(logits: Tensor, ids: Tensor, rest: Tensor, temperature: float) -> Tensor:
    """(rows,): the log of the mass beside the columns ``ids``, which is ``rest`` where that has not lost its digits."""
    tails = rest.log()
    rows = (rest < TINY).nonzero()[:, 0]
    if rows.numel():
        z, entries = logits[rows].double() / temperature, ids[rows]
        inside = torch.zeros_like(z).scatter_add(1, entries.clamp(min=0), (entries >= 0).double())
        tails[rows] = z.masked_fill(inside > 0, -torch.inf).logsumexp(1) - z.logsumexp(1)
    return tails


def _narrow(labels: SoftLabels, *, temperatures: Sequence[float], k: int) -> SoftLabels:
    """The ``k`` largest entries of each row, the mass of its others added to the tails at ``temperatures``."""
    assert labels.ids is not None
    assert labels.offsets is not None
    assert labels.tails is not None
    counts = labels.offsets.diff()
    row = torch.repeat_interleave(counts)
    rest = torch.arange(len(row)) - labels.offsets[row] >= k
    tails = labels.tails[[labels.temperatures.index(t) for t in temperatures]].double()
    for tail, temperature in zip(tails, temperatures, strict=True):
        weights = labels.at(temperature)[0].double()
        dropped = torch.zeros_like(tail).index_add(0, row[rest], weights[rest])
        torch.logaddexp(tail, dropped.log(), out=tail)
    return SoftLabels.topk(
        labels.ids[~rest],
        labels.values[~rest],
        tails,
        vocab_size=labels.vocab_size,
        temperatures=temperatures,
        offsets=torch.cat([counts.new_zeros(1), counts.clamp(max=k).cumsum(0)]),
    )
