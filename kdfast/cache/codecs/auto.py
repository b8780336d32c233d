"""``codec="auto"``: which codec a teacher's rows want, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kdfast.cache.codecs.serves import SERVES
from kdfast.divergences import Divergence

__all__ = ["LARGE_VOCAB", "SMALL_VOCAB", "Choice", "choose"]


class Choice(NamedTuple):
    """A codec, its options, and the reason."""

    name: str
    options: dict[str, Any]
    why: str


SMALL_VOCAB = 4096  # up to here whole rows are at most 4 KB

# The one default that measurements decide: the best student per byte at temperature 1 without a table of tail shapes.
LARGE_VOCAB = Choice(
    "sample",
    {"draws": 50},
    "a large vocabulary at temperature 1: draws from the teacher are unbiased in a few bytes per entry; their gradient "
    "is forward KL's, taken as divergence soft_ce",
)

_WHOLE_ROWS = "a small vocabulary: whole rows serve every divergence and temperature, and cost no more than a few draws"
_TAILS = (
    "a large vocabulary at a temperature other than 1, where the noise of draws exceeds the signal: the top-k with the "
    "exact mass of the rest at each temperature"
)
_STATES = (
    "a large vocabulary and a divergence that needs whole rows: the last hidden state gives them back, at any "
    "temperature, with the teacher's output layer (a codec with tail shapes, prototype, is smaller where its table "
    "and one temperature will do)"
)


def choose(vocab_size: int, temperatures: Sequence[float], divergence: str | Divergence | None = None) -> Choice:
    """What ``codec="auto"`` stands for.

    Args:
        vocab_size: the teacher's.
        temperatures: those that the student will be trained at.
        divergence: the student's loss; None stands for forward KL. ``hidden`` comes without its options, ``width`` and
            ``head``, which only the model has (``capture_lm`` gives them).
    """
    if vocab_size <= SMALL_VOCAB:
        return Choice("dense", {}, _WHOLE_ROWS)
    wanted = Divergence.of(divergence or "forward_kl")
    if wanted.standardize or wanted.name not in SERVES["topk"].divergences:
        return Choice("hidden", {}, _STATES)
    if any(t != 1.0 for t in temperatures):
        return Choice("topk", {"k": 16}, _TAILS)
    return LARGE_VOCAB
