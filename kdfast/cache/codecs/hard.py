"""``hard``: the most likely column alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import FixedWidthCodec, require_kind
from kdfast.cache.codecs.ids import id_field, pack_ids, unpack_ids
from kdfast.cache.codecs.registry import register
from kdfast.labels import SoftLabels
from kdfast.labels import TopK as TopKLabels

__all__ = ["Hard"]


@register
class Hard(FixedWidthCodec):
    """The teacher's argmax, in 2 bytes (3 above 65536 columns). Of equal columns the first counts.

    It decodes to one entry of probability 1 and an empty tail, which is a whole distribution: forward KL to it is
    cross-entropy with the label, at every one of ``temperatures``.
    """

    name = "hard"
    kind = TopKLabels.kind

    def __init__(self, vocab_size: int, temperatures: Sequence[float]) -> None:
        super().__init__(vocab_size, temperatures)
        self.row_dtype = np.dtype([("id", *id_field(self.vocab_size, ()))])

    def config(self) -> dict[str, Any]:
        return {}

    def select(self, logits: Tensor, key: bytes) -> TopKLabels:
        return self._labels(logits.detach().argmax(1))

    def encode(self, labels: SoftLabels) -> bytes:
        labels = require_kind(labels, TopKLabels)
        if labels.counts.ne(1).any() or labels.values.ne(0).any():
            raise ValueError("codec 'hard' stores one entry of probability 1 a row: use topk for labels of other ones")
        out = np.empty(len(labels), self.row_dtype)
        out["id"] = pack_ids(labels.ids.numpy(), self.vocab_size)
        return out.tobytes()

    def unpack(self, packed: NDArray[Any]) -> TopKLabels:
        return self._labels(torch.from_numpy(unpack_ids(packed["id"], self.vocab_size)))

    def _labels(self, ids: Tensor) -> TopKLabels:
        return TopKLabels(
            vocab_size=self.vocab_size,
            values=torch.zeros(len(ids), device=ids.device),
            temperatures=self.temperatures,
            ids=ids.int(),
            offsets=torch.arange(len(ids) + 1, device=ids.device),
            width=1,
            tails=torch.full((len(self.temperatures), len(ids)), -torch.inf, device=ids.device),
        )
