"""A toy language model, and a server that replays what vLLM would have answered for it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from support import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "vllm"
VOCAB, K = 13, 4
PICKY = 12  # after this token only three others are possible
WINDOWS = [torch.tensor(ids) for ids in ([1, 5, 2, 8], [3], [12, 12, 0, 7, 12], [4, 9, 6], [0, 11])]


def log_probs(ids):
    """(length, vocab) float32 log-probabilities after each of ``ids``: a function of the last one, without ties."""
    logits = (7 * ids[:, None] + 5 * torch.arange(VOCAB)) % VOCAB * 0.6
    possible = torch.ones(len(ids), VOCAB, dtype=torch.bool)
    possible[:, 3:] = (ids != PICKY)[:, None]
    return logits.masked_fill(~possible, -torch.inf).log_softmax(1)


class Replay:
    """What the server has been asked, and what it is to answer besides the recorded."""

    def __init__(self):
        self.prompts = []
        self.headers = []
        self.failures = []  # (status, headers, body) for the next completions, first come first served
        self.change = lambda prompt, text: text  # of a recorded completion
        self.models = (FIXTURES / "models.json").read_text()
        recorded = [json.loads(line) for line in (FIXTURES / "completions.jsonl").read_text().splitlines()]
        self._answers = {self._name(pair["request"]): json.dumps(pair["response"]) for pair in recorded}
        self._lock = threading.Lock()

    def answer(self, path, headers, body):
        """(status, headers, text)"""
        if path == "/v1/models":
            return 200, {}, self.models
        assert path == "/v1/completions"
        request = json.loads(body)
        with self._lock:
            self.prompts.append(request["prompt"])
            self.headers.append(headers)
            if self.failures:
                return self.failures.pop(0)
        return 200, {}, self.change(request["prompt"], self._answers[self._name(request)])

    @staticmethod
    def _name(request):
        return json.dumps(request, sort_keys=True)


@contextmanager
def serving(replay):
    """The URL at which ``replay`` answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, text = replay.answer(self.path, dict(self.headers), body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
