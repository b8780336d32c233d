"""The distances at which students are trained: how each one starts, and what it is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

__all__ = ["DECIDING", "DISTANCES", "OTHERS", "Distance", "plan"]


@dataclass(frozen=True)
class Distance:
    """A student near its teacher, as practice makes them.

    Attributes:
        title: for the report.
        family: the teacher's; the student starts from its weights.
        corpus: the text: see ``corpora.py``.
        cut: indices of the layers that are left out. The layers below the first of them stay as they are.
        bits: of rounded weights, trained straight through: the optimizer's weights are exact, and rounded anew after
            each step, as in quantisation-aware distillation. 0: not rounded.
        rank: of adapters beside frozen weights, as in accuracy recovery of a quantised model. 0: weights are trained.
        windows: trained on, each once.
        held_out: windows to measure on.
        batch: windows per step.
        rate: the highest learning rate.
        seeds: how many students the deciding arms have.
    """

    title: str = field(repr=False)
    family: str = "smollm2"
    corpus: str = "topics"
    cut: tuple[int, ...] = ()
    bits: int = 0
    rank: int = 0
    windows: int = 64
    held_out: int = 16
    batch: int = 2
    rate: float = 3e-4
    seeds: int = field(default=5, repr=False)


LONG = "cut-3-long"
DISTANCES: dict[str, Distance] = {
    "cut-3": Distance("layers 10, 14, 18 cut", cut=(10, 14, 18)),
    "cut-1": Distance("layer 10 cut", cut=(10,)),
    "rounded-4": Distance("weights of 4 bits", bits=4, rate=1e-4),
    "rounded-5": Distance("weights of 5 bits", bits=5, rate=1e-4),
    "cut-5": Distance("layers 8, 11, 14, 17, 20 cut", cut=(8, 11, 14, 17, 20)),
    "rounded-8": Distance("weights of 8 bits", bits=8, rate=1e-5),
    "adapters": Distance("adapters of rank 16 beside weights of 4 bits", bits=4, rank=16, rate=1e-3),
    "continuation": Distance("layers 10, 14, 18 cut, the teacher's own text", corpus="continuation", cut=(10, 14, 18)),
    "gemma-cut-1": Distance("Gemma-3-270M, layer 9 cut", "gemma3", cut=(9,), windows=24, held_out=6, batch=1, seeds=1),
    LONG: Distance(
        "layers 10, 14, 18 cut, 25 times the tokens", corpus="manuals", cut=(10, 14, 18), windows=1600, batch=4, seeds=1
    ),
}
# The arms that decide have all seeds, the others one. "start" is a student that is not trained.
DECIDING = ("dense", "systematic-10", "prototype-3", "systematic-5", "sample-10", "topk-16-tail", "systematic-23")
OTHERS = ("none", "sample-23", "prototype-1")


FIRST = ("cut-3", "cut-1")  # with all seeds; then the other distances with one


def plan(arms: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Every student that is to be trained on the labels of ``arms``: distance, arm, seed, the most telling first."""
    groups = [(name, seed) for name, distance in DISTANCES.items() for seed in range(distance.seeds)]
    for name, seed in sorted(groups, key=_turn):
        if seed == 0:
            yield name, "start", 0
        yield from ((name, arm, seed) for arm in arms if seed == 0 or arm not in OTHERS)


def _turn(group: tuple[str, int]) -> int:
    name, seed = group
    if name in FIRST:
        return 0
    return 3 if name == LONG else 1 if seed == 0 else 2
