"""A vLLM server's answer to a window: what to ask for, and the rows in what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kdfast.cache.convert.logprobs import pairs_of
from kdfast.cache.convert.source import Record
from kdfast.cache.errors import CacheError

__all__ = ["prompt_of", "record_of"]

APPENDED = 0  # any id does: its own element is the distribution after the window's last token


def prompt_of(window: Tensor) -> list[int]:
    """The ids to send for a window: its own and one more, for an element speaks of the token that it stands at."""
    return [*window.tolist(), APPENDED]


def record_of(name: str, prompt: Sequence[int], answer: Any, k: int) -> Record:
    """The window that ``prompt`` was made of, with a row of ``k`` entries after each of its tokens.

    ``choices[0].prompt_logprobs`` has an element per token of the prompt: null for the first, then
    ``{id: {"logprob": ..., "rank": ..., "decoded_token": ...}}`` of the k likeliest and of the token itself.

    Raises:
        CacheError: the answer is not of this form, or to another prompt; the message names window and position.
    """
    rows = [
        _row(f"{name}: position {position}", element, prompt[position], k)
        for position, element in enumerate(_elements(name, prompt, answer))
        if position > 0
    ]
    return Record.of(name, np.asarray(prompt[:-1], np.int64), rows)


def _elements(name: str, prompt: Sequence[int], answer: Any) -> list[Any]:
    try:
        elements = answer["choices"][0]["prompt_logprobs"]
    except (IndexError, KeyError, TypeError):
        elements = None
    if not isinstance(elements, list):
        raise CacheError(
            f"{name}: the answer has no list choices[0].prompt_logprobs: this is not a vLLM server, or something in "
            f"between drops them"
        )
    if len(elements) != len(prompt):
        raise CacheError(
            f"{name}: prompt_logprobs has {len(elements)} elements for a prompt of {len(prompt)} tokens, where it must "
            f"have one each: the server adds tokens or cuts the prompt, or leaves out what its prefix cache held"
        )
    return elements


def _row(name: str, element: Any, token: int, k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens of one element, which is that of ``token``."""
    try:
        pairs = pairs_of(element)
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{name}: no entries {{id: {{'logprob': ...}}}}: {error}") from error
    if token not in dict(pairs):
        raise CacheError(
            f"{name}: the prompt's token {token} is not among its own entries {[entry for entry, _ in pairs]}: the "
            f"element is that of another token"
        )
    if len(pairs) > k:
        # The prompt's own token is beyond the k likeliest. Kept, it would make which tokens a row holds depend on the
        # text, and the row more exact exactly where the text is unlikely.
        pairs = [pair for pair in pairs if pair[0] != token]
    if len(pairs) != k:
        raise CacheError(f"{name}: {len(pairs)} entries besides the prompt's own token, where {k} were asked for")
    return pairs
