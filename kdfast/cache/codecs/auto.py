"""``codec="auto"``: which codec a teacher's rows want, and why.

This file names codecs, as no other but their own does: a default is a comparison of all of them, and students that were
trained with each have decided it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kdfast.divergences import Divergence
from kdfast.labels.support import SERVES

__all__ = ["LARGE_VOCAB", "SMALL_VOCAB", "WITH_PROTOTYPES", "Choice", "choose"]


class Choice(NamedTuple):
    """A codec for a teacher, its options, and the reason for it."""

    name: str
    options: dict[str, Any]
    reason: str

    @property
    def why(self) -> str:
        """``reason``, under the name it had before 0.2."""
        return self.reason


SMALL_VOCAB = 4096  # up to here whole rows are at most 4 KB

# The two defaults that measurements decide: the best student per byte in benchmarks/results/frontier.md.
WITH_PROTOTYPES = Choice(
    "prototype",
    {},
    "a large vocabulary: the likeliest ids, and for the rest one of a table of prototypes, train the best student "
    "per byte, with any divergence but logit_mse; the table takes some MB, whatever the cache's size",
)
LARGE_VOCAB = Choice(
    "sample",
    {"draws": 50},
    "a large vocabulary at temperature 1, and no table of prototypes: draws from the teacher are unbiased in a few "
    "bytes per entry; their gradient is forward KL's, taken as divergence soft_ce",
)

_WHOLE_ROWS = "a small vocabulary: whole rows serve every divergence and temperature, and cost no more than a few draws"
_TAILS = (
    "a large vocabulary at a temperature other than 1, where the noise of draws exceeds the signal: the top-k with the "
    "exact mass of the rest at each temperature"
)
_STATES = (
    "a large vocabulary and a divergence or temperatures that need whole rows: the last hidden state gives them back "
    "with the teacher's output layer"
)


def choose(
    vocab_size: int,
    temperatures: Sequence[float],
    divergence: str | Divergence | None = None,
    *,
    prototypes: bool = False,
) -> Choice:
    """Choose the codec that ``codec="auto"`` stands for.

    Args:
        vocab_size: columns of the teacher's logits.
        temperatures: those that the student will be trained at.
        divergence: the student's loss; None stands for forward KL. ``hidden`` comes without its options, ``width`` and
            ``head``, which only the model has (``capture_lm`` gives them).
        prototypes: whether there is a table of prototypes, or one can be learned: ``capture`` can, a ``Writer`` cannot.
    """
    if vocab_size <= SMALL_VOCAB:
        return Choice("dense", {}, _WHOLE_ROWS)
    wanted = Divergence.of(divergence or "forward_kl")
    if prototypes and len(temperatures) == 1 and _serves("prototype", wanted):
        return WITH_PROTOTYPES
    if not _serves("topk", wanted):
        return Choice("hidden", {}, _STATES)
    if any(t != 1.0 for t in temperatures):
        return Choice("topk", {"k": 16}, _TAILS)
    return LARGE_VOCAB


def _serves(kind: str, wanted: Divergence) -> bool:
    return wanted.name in SERVES[kind].divergences and not wanted.standardize
