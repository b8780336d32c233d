"""Names that are nearly right: what their user may have meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["did_you_mean", "no_option"]


def did_you_mean(name: object, known: Iterable[str], terms: Mapping[str, str]) -> str:
    """What ``name`` may have meant, as the end of a message: ": did you mean temperature?". Empty where nobody knows.

    Args:
        name: what was given.
        known: the names that there are.
        terms: other words of the field, in lower case with underscores, and what they are called here.
    """
    meant = _meant(name, known, terms)
    return f": did you mean {meant}?" if meant else ""


def no_option(who: str, unknown: Iterable[str], known: Iterable[str], terms: Mapping[str, str]) -> TypeError:
    """The error of a function that was given options it lacks: what each may have meant, or which ones there are."""
    unknown, known = sorted(unknown), sorted(known)
    said = {name: _meant(name, known, terms) for name in unknown}
    hints = [f"did you mean {meant}{f' by {name}' if unknown[1:] else ''}?" for name, meant in said.items() if meant]
    if len(hints) < len(unknown):
        hints.append(f"it has {', '.join(known)}")
    return TypeError(f"{who} has no option {', '.join(unknown)}: {' '.join(hints)}")


def _meant(name: object, known: Iterable[str], terms: Mapping[str, str]) -> str | None:
    from difflib import get_close_matches  # for errors alone

    if not isinstance(name, str):
        return None
    word = name.strip().lower().replace("-", "_").replace(" ", "_")
    meant = terms.get(word)
    if meant is None:
        names = {one.lower(): one for one in known}
        close = get_close_matches(word, [*names, *terms], n=1)
        meant = names.get(close[0], terms.get(close[0])) if close else None
    return None if meant == name else meant
