"""``codec="auto"``: which codec a teacher's rows want, and why.

This file names codecs, as no other but their own does: a default is a comparison of all of them, and students that were
trained with each have decided it. A label that is another distribution than the row has a floor: it holds a student
back, or pulls it away, that is nearer to its teacher than the label is. So no such label is taken unless the student is
known to be far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kdfast.divergences import Divergence
from kdfast.labels.support import SERVES

__all__ = ["FAR", "FAR_KL", "LARGE_VOCAB", "SMALL_VOCAB", "WITH_PROTOTYPES", "Choice", "choose", "is_far"]


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
FAR = "far"  # what student_kl may be in place of a number
FAR_KL = 1.0  # nats: twice what lies between a row and its label of prototypes, .43 to .48

# What is taken unless the student is known to be far. Near the teacher 23 systematic draws lose nothing that shows of
# what whole rows gain (benchmarks/results/frontier-near.md); their noise is that of 64 independent ones.
LARGE_VOCAB = Choice(
    "sample",
    {"draws": 23},
    "a large vocabulary at temperature 1: draws from the teacher are unbiased in a few bytes per entry, so that they "
    "hold no student back, however near its teacher it is; their gradient is forward KL's, taken as divergence "
    'soft_ce. For a student that is far (student_kl="far") prototypes take a fifth of the bytes',
)
# What is taken for a student that is: the best one per byte in benchmarks/results/frontier.md.
WITH_PROTOTYPES = Choice(
    "prototype",
    {},
    "a large vocabulary and a student far from its teacher: the likeliest ids, and for the rest one of a table of "
    "prototypes, train the best such student per byte, with any divergence but logit_mse. Such labels lie some .45 "
    "nats from the teacher, and pull a student away that is nearer; the table takes some MB, whatever the cache's size",
)

_WHOLE_ROWS = "a small vocabulary: whole rows serve every divergence and temperature, and cost no more than a few draws"
_TAILS = (
    "a large vocabulary at a temperature other than 1, where the noise of draws exceeds the signal: the top-k with the "
    "exact mass of the rest at each temperature, from which the teacher itself has no distance"
)
_STATES = (
    "a large vocabulary and a divergence or temperatures that need whole rows, or for which all other labels hold back "
    "a student that is near its teacher: the last hidden state gives them back with the teacher's output layer"
)


def choose(
    vocab_size: int,
    temperatures: Sequence[float],
    divergence: str | Divergence | None = None,
    *,
    prototypes: bool = False,
    student_kl: float | str | None = None,
) -> Choice:
    """Choose the codec that ``codec="auto"`` stands for.

    Labels of prototypes lie .43 to .48 nats from the teacher's rows. They train the best students per byte that are far
    from their teacher, such as small ones from scratch, and the worst that are near, such as pruned, quantised or
    adapted ones: those are pulled away from it. They are taken for a student that is said to be far, and for no other.

    Args:
        vocab_size: columns of the teacher's logits.
        temperatures: those that the student will be trained at.
        divergence: the student's loss; None stands for forward KL. ``hidden`` comes without its options, ``width`` and
            ``head``, which only the model has (``capture_lm`` gives them).
        prototypes: whether there is a table of prototypes, or one can be learned: ``capture`` can, a ``Writer`` cannot.
        student_kl: KL(teacher || student) in nats, the least that training will bring it to as far as is known; or
            "far", which 1 and more are. None where nothing is known of it.

    Raises:
        ValueError: a ``student_kl`` that is no such number, and not "far".
    """
    far = is_far(student_kl)
    if vocab_size <= SMALL_VOCAB:
        return Choice("dense", {}, _WHOLE_ROWS)
    wanted = Divergence.of(divergence or "forward_kl")
    if far and prototypes and len(temperatures) == 1 and _serves("prototype", wanted):
        return WITH_PROTOTYPES
    if not _serves("topk", wanted):
        return Choice("hidden", {}, _STATES)
    if any(t != 1.0 for t in temperatures):
        return Choice("topk", {"k": 16}, _TAILS)
    return LARGE_VOCAB


def is_far(student_kl: float | str | None) -> bool:
    """Whether a student is far from its teacher. None, where that is not known, is not.

    Raises:
        ValueError: neither a number of nats, nor "far", nor None.
    """
    if student_kl is None or student_kl == FAR:
        return student_kl is not None
    if isinstance(student_kl, bool) or not isinstance(student_kl, (int, float)) or not student_kl >= 0:
        raise ValueError(
            f'student_kl must be KL(teacher || student) in nats, or "far" (1 nat and more), got {student_kl!r}'
        )
    return student_kl >= FAR_KL


def _serves(kind: str, wanted: Divergence) -> bool:
    return wanted.name in SERVES[kind].divergences and not wanted.standardize
