"""Numbers and JSON as a writer writes them, and in no other spelling that Python's own parsers take.

``int`` takes spaces, underscores, signs and the digits of all scripts; ``json`` takes NaN, and of equal names the last.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

__all__ = ["parse_integer", "parse_json", "unique_members"]

DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")


def parse_integer(text: str, low: int, high: int) -> int:
    """The number that ``text`` is in ASCII digits. Raises ``ValueError`` unless it lies in [low, high]."""
    if not DECIMAL.fullmatch(text) or not low <= int(text) <= high:
        raise ValueError(f"{text!r:.60} is not an integer in [{low}, {high}]")
    return int(text)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, in UTF-8 if it is bytes.

    Raises:
        ValueError: it is none, or too deep, or says NaN or Infinity, or names one member of an object twice.
    """
    try:
        return json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_constant=_refuse,
            parse_float=_finite,
            object_pairs_hook=unique_members,
        )
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.60} is beyond the numbers of float64")
    return number


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON from its members. Raises ``ValueError`` if two of them have one name."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object of JSON has {twice!r:.60} twice")
    return members
