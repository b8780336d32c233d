"""A vLLM server, asked over its OpenAI-compatible HTTP API, and the rows in its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from kdfast.cache.capture.http_session import BoundedSession, TooLong
from kdfast.cache.convert.logprobs import pairs_of
from kdfast.cache.convert.source import Record
from kdfast.cache.errors import CacheError

__all__ = ["Server", "prompt_of", "record_of"]

SCHEMES = ("http://", "https://")
LIST_BYTES = 2**24  # of a list of models
# Of an answer: so much for each entry that was asked for (id, log-probability, rank, a token in escapes), and some.
ENTRY_BYTES, SPARE_BYTES = 512, 2**20
BEYOND = 2  # tokens of a request that are no window's: one appended, one generated
APPENDED = 0  # any id does: its own element is the distribution after the window's last token
SHOWN = 500  # characters of an answer that is not understood


class Server:
    """An HTTP session with a vLLM server, which threads may share. Use it as a context manager.

    Args:
        url: ``http://host:8000``, with or without ``/v1``.
        concurrency: connections to keep open.
        timeout: seconds to wait for a connection, and for an answer to begin.
        retries: how often to ask again after a lost connection, or an answer that the server is busy.
        deadline: seconds that a request may take altogether, with its retries. Default: ``timeout`` for each of them.
        api_key: sent as a bearer token.

    Raises:
        ValueError: ``url`` is of another kind, or the deadline not positive.
        CacheError: requests is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        concurrency: int,
        timeout: float,
        retries: int,
        api_key: str | None,
        deadline: float | None = None,
    ) -> None:
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline must be positive, got {deadline}")
        if not url.startswith(SCHEMES):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        self._root = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        deadline = timeout * (retries + 1) if deadline is None else deadline
        self._session = BoundedSession(concurrency=concurrency, timeout=timeout, retries=retries, deadline=deadline)
        if api_key is not None:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def choose_model(self, wanted: str | None, longest: int) -> str:
        """The name of the model to ask: ``wanted``, or the only one that is served.

        Args:
            longest: the tokens of the longest window, which must fit into the model's context.

        Raises:
            CacheError: another model is served, or several are, or its context is too short.
            OSError: the server does not answer.
        """
        answer = self._json("the list of models", "GET", "models", LIST_BYTES)
        try:
            served = {model["id"]: model.get("max_model_len") for model in answer["data"]}
        except (AttributeError, KeyError, TypeError) as error:
            raise CacheError(f"{self._root}/models: is not a list of models: {str(answer)[:SHOWN]}") from error
        name = next(iter(served)) if wanted is None and len(served) == 1 else wanted
        if name is None or name not in served:
            asked = "model=... is needed" if wanted is None else f"there is no model {wanted!r}"
            raise CacheError(f"{self._root}: {asked}: it serves {', '.join(served) or 'none'}")
        context = served[name]
        if context is not None and longest + BEYOND > context:
            raise CacheError(
                f"{self._root}: a window of {longest} tokens, with one appended and one generated, takes a context of "
                f"{longest + BEYOND}; {name} is served with max_model_len {context}"
            )
        return name

    def prompt_logprobs(self, name: str, model: str, prompt: list[int], k: int) -> Any:
        """Request a completion of ``prompt`` with the ``k`` likeliest tokens at each of its places.

        Args:
            name: of the window, for messages.

        Raises:
            CacheError: the server refuses, or the answer is not JSON; the message has the server's own.
            OSError: the server does not answer.
        """
        request = {
            "model": model,
            "prompt": prompt,
            "max_tokens": 1,  # the least that every version takes
            "prompt_logprobs": k,
            # The model's generation_config.json may set these, and engines before V1 applied them to the prompt.
            "temperature": 0,
            "repetition_penalty": 1.0,
        }
        most = SPARE_BYTES + ENTRY_BYTES * (k + 2) * len(prompt)
        return self._json(name, "POST", "completions", most, json=request)

    def _json(self, name: str, method: str, path: str, most: int, **options: Any) -> Any:
        url = f"{self._root}/{path}"
        try:
            answer = self._session.request(method, url, most=most, **options)
        except ConnectionError as error:
            raise ConnectionError(f"{name}: no answer from {url}: {error}") from error
        except TooLong as error:
            raise CacheError(f"{name}: the answer of {url} has {error}, which no answer to the request has") from error
        if answer.status >= 400:
            raise CacheError(f"{name}: {url} answers HTTP {answer.status}: {_message(answer.body)}")
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{name}: {url} answers with what is not JSON: {_text(answer.body)!r}") from error

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()


def _message(body: bytes) -> str:
    """The server's error message: ``{"error": {"message": ...}}``, or in older versions ``{"message": ...}``."""
    try:
        answer = json.loads(body)
        return str(answer.get("error", answer)["message"])[:SHOWN]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return _text(body)


def _text(body: bytes) -> str:
    return body[:SHOWN].decode("utf-8", "replace")


# ---- requests and answers -------------------------------------------------------------------------------------------


def prompt_of(window: Tensor) -> list[int]:
    """The ids to send for a window: its own and one more, as each element of the answer is about its own token."""
    return [*window.tolist(), APPENDED]


def record_of(name: str, prompt: Sequence[int], answer: Any, k: int) -> Record:
    """Parse the answer to ``prompt_of`` a window: a record with a row of ``k`` entries after each of its tokens.

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
    """The k likeliest tokens of one element of ``prompt_logprobs``, the one of the prompt's token ``token``."""
    try:
        pairs = pairs_of(element)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
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
