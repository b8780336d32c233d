"""Prototype labels with a sampled residual: unbiased signed draws of the difference between teacher and label."""

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
    """Draws of the teacher's probabilities minus the label's: ``E[scale * sum(sign * weight)] = teacher - label``.

    A label plus its draws is no distribution, but the mean over draws is one.
    """

    draws: SoftLabels  # of the residual's absolute values, by the codec ``sample``
    signs: Tensor  # (entries,) float32: 1 or -1
    scale: Tensor  # (rows,) float32

    @classmethod
    def cat(cls, parts: list[Residual]) -> Residual:
        draws = SoftLabels.cat([part.draws for part in parts])
        return cls(draws, torch.cat([part.signs for part in parts]), torch.cat([part.scale for part in parts]))

    @property
    def extra_bytes(self) -> float:
        """The bytes of signs and scales."""
        return len(self.signs) / 8 + len(self.scale) * SCALE_BYTES

    def add_to(self, probs: Tensor) -> Tensor:
        assert self.draws.ids is not None
        assert self.draws.offsets is not None
        row = torch.repeat_interleave(self.draws.offsets.diff())
        return probs.index_put((row, self.draws.ids.long()), self.signs * self.draws.values * self.scale[row], True)


def residual_of(probs: Tensor, labels: SoftLabels) -> Tensor:
    """(rows, vocab) float32: the teacher's probabilities minus those of the labels."""
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
    """Cross-entropy to labels plus residual; its mean over draws is that to the teacher, if the scale were exact."""
    return F.cross_entropy(logits.float(), residual.add_to(densify(labels)))
