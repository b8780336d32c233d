"""A server that does not end: the deadline, the limit to what is read, and waits that it asks for."""

import socket
import threading
import time

import pytest

from kdfast.cache import CacheError
from kdfast.cache.capture import http_session
from kdfast.cache.capture.http_session import BoundedSession, TooLong
from kdfast.cache.capture.vllm_client import Server

pytest.importorskip("requests")


class Line:
    """A server that answers each connection with some bytes, then drips a byte now and then until it is closed."""

    def __init__(self, *answers, drip=b""):
        self._answers, self._drip, self._ended = list(answers), drip, threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while not self._ended.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            answer = self._answers[min(self.connections, len(self._answers)) - 1]
            threading.Thread(target=self._answer, args=(connection, answer), daemon=True).start()

    def _answer(self, connection, answer):
        with connection:
            connection.recv(65536)
            try:
                connection.sendall(answer)
                while self._drip and not self._ended.wait(0.02):
                    connection.sendall(self._drip)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(1)
                while connection.recv(65536):  # what is left of the request, else the answer would be lost with it
                    pass
            except OSError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._socket.close()


def http(body, status="200 OK", **headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def session(**options):
    return BoundedSession(**{"concurrency": 1, "timeout": 30.0, "retries": 0, "deadline": 30.0, **options})


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nX-Drip: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b""],
    ids=["header", "body", "status"],
)
def test_a_dripping_answer_ends_by_the_deadline(answer):
    with Line(answer, drip=b"x") as line:
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match=r"longer than the deadline of 0\.3 s"):
            session(deadline=0.3).request("GET", line.url, most=10**6)
        assert time.monotonic() - begin < 10


def test_an_answer_has_a_length():
    with Line(http(b"x" * 1000)) as line:
        assert session().request("GET", line.url, most=1000).body == b"x" * 1000
        with pytest.raises(TooLong, match="more than 999 bytes"):
            session().request("GET", line.url, most=999)
    with Line(b"HTTP/1.1 200 OK\r\n\r\n", drip=b"x" * 10**6) as line, pytest.raises(TooLong):
        session().request("GET", line.url, most=10**6)


def test_a_wait_is_bounded(monkeypatch):
    waits = []
    monkeypatch.setattr(http_session.time, "sleep", waits.append)
    busy = [http(b"", "503 Busy", Retry_After=text) for text in ("9" * 400, "2", "-5", "Wed, 21 Oct 2065 07:28:00 GMT")]
    with Line(*busy, http(b"{}")) as line:
        answer = session(retries=5, deadline=1000.0).request("GET", line.url, most=100)
    assert (answer.status, answer.body) == (200, b"{}")
    assert waits == [60.0, 2.0, 2.0, 4.0]  # as asked for within bounds, else doubled


def test_no_wait_goes_beyond_the_deadline():
    with Line(http(b"busy", "503 Busy", Retry_After="50")) as line:
        begin = time.monotonic()
        answer = session(retries=9, deadline=5.0).request("GET", line.url, most=100)
        assert (answer.status, line.connections) == (503, 1)
        assert time.monotonic() - begin < 5


def test_a_lost_connection_is_asked_again(monkeypatch):
    monkeypatch.setattr(http_session.time, "sleep", lambda seconds: None)
    with Line(b"", b"", http(b"[]")) as line:
        assert session(retries=2).request("GET", line.url, most=100).body == b"[]"
    with Line(b"") as line, pytest.raises(ConnectionError):
        session(retries=2).request("GET", line.url, most=100)


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"[" * 100_000, "what is not JSON"), (b"\xff\xfe", "what is not JSON"), (b"[1]", "is not a list of models")],
)
def test_answers_that_are_none_are_named(body, message):
    options = {"concurrency": 1, "timeout": 5.0, "retries": 0, "api_key": None}
    with Line(http(body)) as line, Server(line.url, **options) as server, pytest.raises(CacheError, match=message):
        server.choose_model(None, 10)


def test_an_answer_to_a_prompt_is_as_long_as_one_can_be():
    options = {"concurrency": 1, "timeout": 5.0, "retries": 0, "api_key": None, "deadline": 60.0}
    with (
        Line(http(b" " * 2 * 2**20)) as line,
        Server(line.url, **options) as server,
        pytest.raises(CacheError, match=r"window 0: the answer of .* more than 1,05\d,\d* bytes"),
    ):
        server.prompt_logprobs("window 0", "m", [1, 2, 3], 5)
