"""HTTP requests with an end: a deadline for all of a request, its retries included, and a limit to what is read."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, NamedTuple

from kdfast.cache.errors import optional_package

__all__ = ["Answer", "BoundedSession", "TooLong"]

BUSY = (429, 502, 503)
BACKOFF = 0.5  # seconds, doubled with each retry, where the server does not say how long to wait
MOST_WAIT = 60.0  # seconds, whatever the server says
CHUNK = 2**16  # bytes read at a time, at most


class Answer(NamedTuple):
    """What a server has answered: the whole of it."""

    status: int
    body: bytes
    wait: str  # its Retry-After


class TooLong(Exception):
    """An answer is longer than it may be."""


class BoundedSession:
    """An HTTP session that threads may share. A request ends by its deadline, however slowly a server drips.

    Args:
        concurrency: connections to keep open.
        timeout: seconds to wait for a connection, and for each part of an answer.
        retries: how often to ask again after a lost connection, or an answer that the server is busy.
        deadline: seconds that a request may take altogether, with its retries and the waits between them.

    Raises:
        CacheError: requests is not installed.
    """

    def __init__(self, *, concurrency: int, timeout: float, retries: int, deadline: float) -> None:
        requests = optional_package("requests", "asking a vLLM server")
        self._timeout, self._retries, self._deadline = timeout, retries, deadline
        self._lost = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
        self._failures = requests.RequestException
        self._session = requests.Session()
        self._session.headers["Accept-Encoding"] = "identity"  # what is read is what is sent
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=concurrency, max_retries=0)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    @property
    def headers(self) -> Any:
        """The headers of every request."""
        return self._session.headers

    def request(self, method: str, url: str, *, most: int, **options: Any) -> Answer:
        """Send a request, and once more after each failure that may pass.

        Args:
            most: bytes that the answer may have.
            options: as ``requests.Session.request`` takes them.

        Raises:
            ConnectionError: there was no answer in time.
            TooLong: the answer is longer than ``most``.
        """
        end = time.monotonic() + self._deadline
        for attempt in range(self._retries + 1):
            wait = BACKOFF * 2**attempt
            try:
                answer = self._once(method, url, end, most, options)
            except self._lost as error:
                if attempt == self._retries or time.monotonic() + wait >= end:
                    raise ConnectionError(str(error)) from error
            except self._failures as error:
                raise ConnectionError(str(error)) from error
            else:
                wait = _seconds(answer.wait, wait)
                if answer.status not in BUSY or attempt == self._retries or time.monotonic() + wait >= end:
                    return answer
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, url: str, end: float, most: int, options: dict[str, Any]) -> Answer:
        """One request, in a thread: reading waits for bytes, and a server that sends some now and then ends no wait."""
        outcome: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                outcome.put(self._read(method, url, end, most, options))
            except BaseException as error:  # to be raised where it is waited for
                outcome.put(error)

        threading.Thread(target=work, name="kdfast-http", daemon=True).start()
        try:
            found = outcome.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise ConnectionError(f"it has taken longer than the deadline of {self._deadline:g} s") from None
        if isinstance(found, BaseException):
            raise found
        return found

    def _read(self, method: str, url: str, end: float, most: int, options: dict[str, Any]) -> Answer:
        left = max(0.001, end - time.monotonic())
        limit = min(self._timeout, left)
        with self._session.request(method, url, timeout=limit, stream=True, **options) as response:
            parts, size = [], 0
            for part in response.iter_content(CHUNK):
                parts.append(part)
                size += len(part)
                if size > most:
                    raise TooLong(f"more than {most:,} bytes")
                if time.monotonic() > end:
                    raise ConnectionError(f"it has taken longer than the deadline of {self._deadline:g} s")
            return Answer(response.status_code, b"".join(parts), response.headers.get("Retry-After", ""))

    def close(self) -> None:
        """Close the connections."""
        self._session.close()


def _seconds(text: str, otherwise: float) -> float:
    """A Retry-After in seconds, bounded; ``otherwise`` where it is none, or a date."""
    if not text.isascii() or not text.isdigit():
        return otherwise
    return min(float(text[:9]), MOST_WAIT)
