"""A teacher's fingerprint that knows what it was made of, so that two of them can be told apart in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Fingerprint", "differences"]

SHOWN = 5  # parts that a message names


class Fingerprint(str):
    """A fingerprint: a text, and beside it the parts that went into it.

    Attributes:
        parts: what the fingerprint was made of, by name: short values as they are, others as digests.
    """

    parts: Mapping[str, str]
    _older: Callable[[], list[str]]

    def __new__(
        cls, text: str, parts: Mapping[str, str] | None = None, older: Callable[[], list[str]] = list
    ) -> Fingerprint:
        made = super().__new__(cls, text)
        made.parts, made._older = dict(parts or {}), older
        return made

    @classmethod
    def of(cls, text: str) -> Fingerprint:
        """``text`` itself if it is one, else a fingerprint without parts."""
        return text if isinstance(text, Fingerprint) else cls(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return Fingerprint, (str(self), dict(self.parts))  # elsewhere there is no teacher to take older forms of

    def older(self) -> list[str]:
        """The texts that earlier versions made of the same teacher. Making them may take as long as this one."""
        return self._older()

    def with_part(self, name: str, text: str, parts: Mapping[str, str], older: str) -> Fingerprint:
        """The fingerprint of this teacher together with another thing, such as its tokenizer.

        Args:
            name: of the thing.
            text, older: its own fingerprint, and the one that earlier versions made.
            parts: what its fingerprint was made of.
        """

        def all_older() -> list[str]:
            pairs = [(first, second) for first in (self, *self.older()) for second in (text, older)]
            return [f"{first} {name} {second}" for first, second in pairs[1:]]

        more = {f"{name}.{part}": value for part, value in parts.items()}
        return Fingerprint(f"{self} {name} {text}", {**self.parts, **more}, all_older)


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What differs between the parts of two fingerprints, in words; empty where that cannot be said."""
    if not ours or not theirs:
        return ""
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    shown = [f"{name} ({ours.get(name, 'none')} here, {theirs.get(name, 'none')} there)" for name in names[:SHOWN]]
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + rest
