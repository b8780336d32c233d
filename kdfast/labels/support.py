"""What stored labels can be asked for: the one table that the losses, ``choose`` and the documentation read.

A record that keeps a few entries of a row cannot say what reverse KL needs to know of the other columns. Asking for it
is an error here, not a wrong number there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from kdfast.divergences import DIVERGENCES, Divergence
from kdfast.labels import SoftLabels

__all__ = ["CODEC_KINDS", "SERVES", "Serves", "require_served", "served_by"]


@dataclass(frozen=True)
class Serves:
    """What one kind of labels serves.

    Args:
        divergences: by name, and how near the loss is to that of the teacher's whole rows: "exact" (up to the stored
            precision), "lower bound" (the tail as one class), "unbiased" (in expectation over the draws), or
            "approximate" (the tail has another row's shape).
        any_temperature: else the temperatures that the labels hold.
        standardize: z-scores need the logits of the whole row.
        entropy: the teacher's entropy is known, so that a KL divergence has its value and not just its gradient.
    """

    divergences: Mapping[str, str]
    any_temperature: bool = False
    standardize: bool = False
    entropy: bool = True


def _all(how: str, *, but: tuple[str, ...] = ()) -> Mapping[str, str]:
    return MappingProxyType({name: how for name in DIVERGENCES if name not in but})


_WHOLE = Serves(_all("exact"), any_temperature=True, standardize=True)

SERVES: Mapping[str, Serves] = MappingProxyType(
    {
        "topk": Serves(MappingProxyType({"forward_kl": "lower bound", "soft_ce": "lower bound"})),
        "weights": Serves(MappingProxyType({"soft_ce": "unbiased"}), entropy=False),
        "prototype": Serves(_all("approximate", but=("logit_mse",))),
        "dense": _WHOLE,
        "hidden": _WHOLE,
    }
)

# The kind of labels that each codec's records decode to.
CODEC_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "topk": "topk",
        "hard": "topk",
        "sample": "weights",
        "threshold": "weights",
        "prototype": "prototype",
        "dense": "dense",
        "hidden": "hidden",
    }
)


def served_by(divergence: Divergence, *, any_temperature: bool = False) -> list[str]:
    """The kinds that serve ``divergence``, at any temperature or at least at their own."""
    return [
        kind
        for kind in SERVES
        if _refusal(kind, divergence) is None and SERVES[kind].any_temperature >= any_temperature
    ]


def require_served(labels: SoftLabels, divergence: Divergence, temperature: float | Tensor) -> None:
    """Raise ``ValueError``, naming what would do, unless ``labels`` serve ``divergence`` at a teacher temperature."""
    refusal = _refusal(labels.kind, divergence)
    if refusal is not None:
        raise ValueError(f"{refusal}; {_list(served_by(divergence))} labels serve it")
    if not SERVES[labels.kind].any_temperature and labels.find_temperature(temperature) is None:
        got = "a tensor" if isinstance(temperature, Tensor) else temperature
        raise ValueError(
            f"{labels.kind} soft labels hold teacher_temperature {labels.temperatures}, got {got}; "
            f"{_list(served_by(divergence, any_temperature=True))} labels serve any"
        )


def _refusal(kind: str, divergence: Divergence) -> str | None:
    serves = SERVES[kind]
    if divergence.name in serves.divergences and serves.standardize >= divergence.standardize:
        return None
    wanted = f"{divergence.name}{', standardized' if divergence.standardize else ''}"
    hint = (
        ""
        if serves.entropy or divergence.name != "forward_kl"
        else ("; unnormalised weights have forward KL's gradient under soft_ce, but not its value")
    )
    return f"{kind} soft labels serve {_list(list(serves.divergences))}, got divergence {wanted}{hint}"


def _list(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
