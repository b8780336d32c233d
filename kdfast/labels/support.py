"""What stored labels can be asked for: the one table that the losses, ``choose`` and the documentation read.

A record that keeps a few entries of a row cannot say what reverse KL needs to know of the other columns. Asking for it
is an error here, not a wrong number there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from kdfast.divergences import Divergence
from kdfast.labels.ragged import Prototype, TopK, Weights
from kdfast.labels.soft_labels import SoftLabels, Support
from kdfast.labels.whole import Dense, Hidden

__all__ = ["SERVES", "Support", "check_supported", "supporting_kinds"]

SERVES: Mapping[str, Support] = MappingProxyType(
    {labels.kind: labels.support for labels in (TopK, Weights, Prototype, Dense, Hidden)}
)


def supporting_kinds(divergence: Divergence, *, any_temperature: bool = False) -> list[str]:
    """The kinds of labels that serve ``divergence``, at any temperature or at least at the ones that they hold."""
    return [
        kind
        for kind, support in SERVES.items()
        if support.serves(divergence) and support.any_temperature >= any_temperature
    ]


def check_supported(labels: SoftLabels, divergence: Divergence, temperature: float | Tensor) -> None:
    """Raise ``ValueError``, naming what would do, unless ``labels`` serve ``divergence`` at a teacher temperature."""
    if not labels.support.serves(divergence):
        raise ValueError(f"{_refusal(labels, divergence)}; {_list(supporting_kinds(divergence))} labels serve it")
    if not labels.support.any_temperature and labels.find_temperature(temperature) is None:
        got = "a tensor" if isinstance(temperature, Tensor) else temperature
        raise ValueError(
            f"{labels.kind} soft labels hold teacher_temperature {labels.temperatures}, got {got}; "
            f"{_list(supporting_kinds(divergence, any_temperature=True))} labels serve any"
        )


def _refusal(labels: SoftLabels, divergence: Divergence) -> str:
    wanted = f"{divergence.name}{', standardized' if divergence.standardize else ''}"
    hint = ""
    if divergence.name == "forward_kl" and not labels.support.entropy:
        hint = (
            "; divergence=\"soft_ce\" has forward KL's gradient, but not its value, which needs the teacher's entropy"
        )
    return f"{labels.kind} soft labels serve {_list(list(labels.support.divergences))}, got divergence {wanted}{hint}"


def _list(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
