"""Prototypes with a sampled residual: what a label misses of the teacher, drawn without bias, with signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast import SoftLabels

__all__ = ["Residual", "residual_of", "signed_cross_entropy"]

SCALE_BYTES = 2  # float16


@dataclass(frozen=True)
class Residual:
    """``E[scale * sum(sign * weight)] = teacher - label``: no label is a distribution, but their mean is."""

    draws: SoftLabels  # of the residual's sizes, by the codec ``sample``
    signs: Tensor  # (entries,) float32: 1 or -1
    scale: Tensor  # (rows,) float32

    @classmethod
    def cat(cls, parts: list[Residual]) -> Residual:
        draws = SoftLabels.cat([part.draws for part in parts])
        return cls(draws, torch.cat([part.signs for part in parts]), torch.cat([part.scale for part in parts]))

    @property
    def extra_bytes(self) -> float:
        """Besides those of the draws."""
        return len(self.signs) / 8 + len(self.scale) * SCALE_BYTES

    def add_to(self, probs: Tensor) -> Tensor:
        assert self.draws.ids is not None
        assert self.draws.offsets is not None
        row = torch.repeat_interleave(self.draws.offsets.diff())
        return probs.index_put((row, self.draws.ids.long()), self.signs * self.draws.values * self.scale[row], True)


def residual_of(probs: Tensor, labels: SoftLabels) -> Tensor:
    """(rows, vocab) float32: the teacher's probabilities less those of the labels."""
    return probs - densify(labels)


def densify(labels: SoftLabels) -> Tensor:
    """(rows, vocab) float32 probabilities of prototype labels."""
    assert labels.ids is not None
    assert labels.offsets is not None
    assert labels.prototypes is not None
    assert labels.prototype_ids is not None
    assert labels.tails is not None
    at = torch.repeat_interleave(labels.offsets.diff()), labels.ids.long()
    probs = labels.prototypes[labels.prototype_ids].float().index_put(at, torch.zeros(()))
    probs *= (labels.tails[0].exp() / probs.sum(1))[:, None]
    return probs.index_put(at, labels.values)


def signed_cross_entropy(logits: Tensor, labels: SoftLabels, residual: Residual) -> Tensor:
    """Its mean over draws is the cross-entropy to the teacher, up to the residual's quantised scale."""
    return F.cross_entropy(logits.float(), residual.add_to(densify(labels)))
