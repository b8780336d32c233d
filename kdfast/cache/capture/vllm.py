"""``capture_vllm``: capturing a language model that a vLLM server runs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from kdfast._progress import Progress
from kdfast.cache.capture.corpus import Document, cut
from kdfast.cache.capture.fingerprint import with_tokenizer
from kdfast.cache.capture.vllm_client import Server, prompt_of, record_of
from kdfast.cache.convert.importing import TOLERANCE, store_records
from kdfast.cache.convert.report import BiasReport
from kdfast.cache.convert.rows import to_rows
from kdfast.cache.convert.source import Record
from kdfast.cache.format.keys import make_key
from kdfast.cache.write.writer import Writer

__all__ = ["capture_vllm"]

T = TypeVar("T")
AHEAD = 2  # answers per connection that may wait for an earlier one: a slow request then stops none of the others


def capture_vllm(
    url: str,
    documents: Iterable[Document],
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    teacher: str,
    max_length: int,
    tokenizer: Any = None,
    add_special_tokens: bool = True,
    k: int = 20,
    value_dtype: str = "float16",
    model: str | None = None,
    concurrency: int = 32,
    timeout: float = 600.0,
    retries: int = 5,
    deadline: float | None = None,
    api_key: str | None = None,
    progress: bool = True,
    **options: Any,
) -> BiasReport:
    """Ask a vLLM server for the top-k log-probabilities after every token of documents, and store them as ``topk``.

    Records, keys, rows and targets are those of ``capture_lm``: a record per window, row i being the distribution after
    token i, so a student's loader asks for either cache in the same way. The tail is what the entries leave of 1 at
    T = 1; a server says nothing of other temperatures. What that leaves out is in the report::

        report = capture_vllm("http://localhost:8000", texts, "labels", tokenizer=tokenizer, max_length=1024,
                              vocab_size=128256, teacher="meta-llama/Llama-3.1-70B-Instruct, bfloat16")
        print(*report.lines(), sep="\\n")

    Windows that the cache holds are not asked for again. They are written in the corpus's order, whatever order the
    answers come in, so the files depend on the answers alone. After an error the windows before the one at fault are
    kept, as the ``Writer`` keeps them, and the next call resumes there.

    The server must give prompt log-probabilities unscaled, as ``--logprobs-mode raw_logprobs`` does, the default.

    Args:
        url: the server: ``http://host:8000``.
        documents: as ``capture_lm`` takes them.
        path: the cache's directory.
        vocab_size: of the teacher's logits. The server does not tell.
        teacher: a fingerprint: a text that changes with whatever changes the answers, for the server does not show its
            weights. The tokenizer's is added to it.
        max_length: of a window, in tokens. The server's ``max_model_len`` must be larger by two.
        tokenizer, add_special_tokens: as ``capture_lm`` takes them.
        k: entries per row. A server started without ``--max-logprobs`` gives at most 20.
        value_dtype: of the stored log-probabilities: float16 or float32.
        model: the served model's name. Not needed if there is one only.
        concurrency: requests under way at once.
        timeout: seconds to wait for an answer.
        retries: how often to ask again after a lost connection or an answer 429, 502 or 503.
        deadline: seconds that a request may take altogether, with its retries. Default: ``timeout`` for each of them.
        api_key: the server's ``--api-key``.
        progress: show how far it is on standard error: a bar on a terminal, elsewhere a line a minute.
        options: the ``Writer``'s: ``writer``, ``shard_bytes``, ...

    Raises:
        ValueError: bad sizes, no teacher, no http(s) URL, a text without a tokenizer, or ids outside the vocabulary.
        CacheError: the server refuses, or its answer is not what was asked for; the message names window and position.
        CacheMismatchError: ``path`` holds the cache of another teacher, tokenizer or options.
        OSError: the server does not answer, or a shard cannot be written.
    """
    _check(vocab_size=vocab_size, teacher=teacher, k=k, concurrency=concurrency, timeout=timeout, retries=retries)
    corpus = cut(tokenizer, documents, max_length, add_special_tokens=add_special_tokens, progress=progress)
    _check_ids(corpus, vocab_size)
    stored: dict[str, Any] = {"codec": "topk", "temperatures": (1.0,), "k": k, "value_dtype": value_dtype}
    fingerprint = with_tokenizer(teacher, tokenizer, add_special_tokens)
    select = partial(to_rows, vocab_size=vocab_size, k=k, value_dtype=value_dtype, tolerance=TOLERANCE)
    report = BiasReport(f"the vLLM server {url}")
    with Server(
        url, concurrency=concurrency, timeout=timeout, retries=retries, api_key=api_key, deadline=deadline
    ) as server:
        model = server.choose_model(model, max(map(len, corpus), default=0))
        with Writer(path, vocab_size=vocab_size, teacher=fingerprint, **stored, **options) as writer:
            lacking = _lacking(corpus, writer)
            report.duplicates = len(corpus) - len(lacking)
            ask = partial(_ask, server, model, corpus, k)
            bar = Progress("capture", total=len(lacking), unit="windows", shown=progress)
            with closing(_in_order(ask, lacking, concurrency)) as records, bar:
                store_records(records, select, writer, report, progress=bar.advance)
    return report


def _check(*, vocab_size: int, teacher: str, k: int, concurrency: int, timeout: float, retries: int) -> None:
    if not isinstance(teacher, str) or not teacher:
        raise ValueError(f"teacher must be a text that names the server's weights, got {teacher!r}")
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k must lie between 1 and vocab_size {vocab_size}, got {k}")
    if concurrency < 1 or retries < 0 or not timeout > 0:
        raise ValueError(
            f"concurrency and timeout must be positive and retries not negative, got {concurrency}, {timeout} and "
            f"{retries}"
        )


def _check_ids(corpus: Sequence[Tensor], vocab_size: int) -> None:
    for number, ids in enumerate(corpus):
        low, high = ids.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"window {number}: ids from {low} to {high} are not of a vocabulary of {vocab_size}")


def _lacking(corpus: Sequence[Tensor], writer: Writer) -> list[int]:
    """The numbers of the windows that the cache lacks, in order, each text once."""
    first = {key: number for number, key in reversed([*enumerate(map(make_key, corpus))]) if key not in writer}
    return sorted(first.values())


def _ask(server: Server, model: str, corpus: Sequence[Tensor], k: int, number: int) -> Record:
    name, prompt = f"window {number}", prompt_of(corpus[number])
    return record_of(name, prompt, server.prompt_logprobs(name, model, prompt, k), k)


def _in_order(work: Callable[[int], T], numbers: Iterable[int], concurrency: int) -> Generator[T, None, None]:
    """``map(work, numbers)`` by ``concurrency`` threads, in order, holding few results. An error comes in its turn."""
    pool = ThreadPoolExecutor(concurrency, "capture_vllm")
    under_way: deque[Future[T]] = deque()
    try:
        for number in numbers:
            if len(under_way) == AHEAD * concurrency:
                yield under_way.popleft().result()
            under_way.append(pool.submit(work, number))
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
