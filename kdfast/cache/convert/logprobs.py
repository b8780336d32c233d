"""``TopKLogProbs``: top-k log-probabilities in text or Parquet, as vLLM returns them and axolotl stores them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdfast.cache.convert.parquet import parquet_records
from kdfast.cache.convert.source import Record, Source, named, token_ids
from kdfast.cache.errors import CacheError
from kdfast.cache.format.regular import open_regular
from kdfast.cache.format.strict import unique_members

__all__ = ["ALIGNMENTS", "TopKLogProbs", "pairs_of"]

ALIGNMENTS = ("position", "next")
TOKEN = re.compile(r"(?:token_id:)?([0-9]{1,18})")
CLAMPED = -9999.0  # what vLLM writes for -inf, which JSON cannot say


class TopKLogProbs(Source):
    """A file of samples: JSON lines (``.jsonl``, ``.json``) or Parquet, with ``input_ids`` and ``logprobs``.

    ``logprobs`` has an element per token: null, or the token's entries in one of these forms, where an id is an
    integer, its digits, or ``token_id:`` and its digits:

    * ``{id: log-probability}`` or vLLM's ``{id: {"logprob": log-probability, ...}}``;
    * a list of those;
    * a list of ``{"token": id, "logprob": log-probability}`` (axolotl);
    * a list of log-probabilities, their ids being in ``target_token_ids`` in the same places (axolotl's second form).

    Args:
        path: the file.
        alignment: which token an element speaks of; there is no default, for a wrong one ruins the labels silently.
            ``"position"``: element i is the distribution *of* token i, as vLLM's prompt_logprobs has it. The first is
            null, for no teacher has one, and the last token's successor has none.
            ``"next"``: element i is the distribution of what follows token i. It may be missing for the last token.
        max_bytes: what a row group of a Parquet file may take once it is unpacked. Default: 256 MiB, or 64 times what
            it takes in the file if that is more.

    Raises:
        ExpansionError: a row group takes more than ``max_bytes``.
        CacheError: a sample is not of this form or alignment: file, sample and position.
    """

    what = "top-k log-probabilities"

    def __init__(self, path: Path, alignment: str | None, max_bytes: int | None = None) -> None:
        if alignment not in ALIGNMENTS:
            raise CacheError(
                f"{path}: alignment must be 'position' (element i is the distribution of token i, the first one null) "
                f"or 'next' (element i is the distribution of token i + 1), got {alignment!r}"
            )
        self._path, self._alignment, self._max_bytes = path, alignment, max_bytes
        self.k, self.size = 0, 0
        for record in self:  # what a cache must be told before its first row
            self.k = max(self.k, int(record.counts.max(initial=0)))
            self.size += 1
        if not self.k:
            raise CacheError(f"{path}: holds no log-probability")

    def __iter__(self) -> Iterator[Record]:
        samples = _parquet(self._path, self._max_bytes) if self._path.suffix == ".parquet" else _json_lines(self._path)
        for number, sample in samples:
            name = f"{self._path}: sample {number}"
            with named(name):
                record = self._record(name, sample)
            yield record

    def _record(self, name: str, sample: Mapping[str, Any]) -> Record:
        tokens = token_ids(sample["input_ids"])
        given = sample.get("target_token_ids")
        elements = [
            None if element is None or len(element) == 0 else _entries(element, given[i] if given is not None else None)
            for i, element in enumerate(sample["logprobs"])
        ]
        return Record.of(name, tokens, self._aligned(name, elements, len(tokens)))

    def _aligned(self, name: str, elements: list[Any], tokens: int) -> list[list[tuple[int, float]]]:
        """The elements that are rows, row i being the distribution of what follows token i."""
        count = len(elements)
        if self._alignment == "position":
            if count != tokens:
                raise CacheError(f"{name}: {count} logprobs for {tokens} input_ids; alignment 'position' wants as many")
            if elements and elements[0] is not None:
                raise CacheError(
                    f"{name}: its first logprobs element is not null, but with alignment 'position' it would be the "
                    f"distribution of the first token: is it alignment 'next'?"
                )
            first, elements = 1, elements[1:]
        else:
            if not tokens - 1 <= count <= tokens:
                raise CacheError(
                    f"{name}: {count} logprobs for {tokens} input_ids; alignment 'next' wants as many or one fewer"
                )
            if count > 1 and elements[0] is None:
                raise CacheError(
                    f"{name}: its first logprobs element is null, but with alignment 'next' it is the distribution of "
                    f"the second token: is it alignment 'position'?"
                )
            first = 0
            if count == tokens and elements and elements[-1] is None:
                elements = elements[:-1]
        for position, element in enumerate(elements):
            if element is None:
                raise CacheError(f"{name}: element {first + position} of logprobs is null or empty")
        return elements


def _entries(element: Any, given: Any) -> list[tuple[int, float]]:
    """The (id, log-probability) pairs of one element of ``logprobs``; ``given``: its ids, if they lie elsewhere."""
    if given is not None:
        return [(_token(token), float(value)) for token, value in zip(given, element, strict=True)]
    if isinstance(element, Mapping):
        return pairs_of(element)
    if all(isinstance(entry, Mapping) and {"token", "logprob"} <= entry.keys() for entry in element):
        return [(_token(entry["token"]), _value(entry["logprob"])) for entry in element]
    return [pair for entry in element for pair in pairs_of(entry)]


def pairs_of(entry: Any) -> list[tuple[int, float]]:
    """The (id, log-probability) pairs of ``{id: log-probability}`` or ``{id: {"logprob": log-probability, ...}}``.

    Raises:
        KeyError, TypeError, ValueError: it is neither.
    """
    if not isinstance(entry, Mapping):
        raise TypeError(f"an entry of logprobs must name its token, got {entry!r:.60}")
    return [(_token(token), _value(value)) for token, value in entry.items()]


def _token(token: Any) -> int:
    if isinstance(token, str):
        match = TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(f"{token!r:.60} is not a token's id: capture with ids instead of texts")
        return int(match[1])
    if isinstance(token, bool) or not isinstance(token, int):
        raise TypeError(f"{token!r:.60} is not a token's id")
    return token


def _value(value: Any) -> float:
    number = value["logprob"] if isinstance(value, Mapping) else value
    return -math.inf if number is None or number == CLAMPED else float(number)


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_regular(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line.decode("utf-8"), object_pairs_hook=unique_members)
            except (ValueError, RecursionError) as error:
                raise CacheError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(sample, dict) or not {"input_ids", "logprobs"} <= sample.keys():
                raise CacheError(f"{path}: line {number} lacks input_ids or logprobs")
            yield number, sample


def _parquet(path: Path, max_bytes: int | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    columns = ["input_ids", "logprobs"]
    for number, row in enumerate(parquet_records(path, columns, ["target_token_ids"], max_bytes)):
        with named(f"{path}: sample {number}"):
            sample = {name: scalar.as_py() for name, scalar in row.items()}
        yield number, sample
