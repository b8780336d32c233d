"""Timing how fast labels are written and read, on one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.cache.codecs.base import Codec
from kdfast.cache.read.packed import PackedLabels

__all__ = ["Speed", "one_thread", "speed"]


@dataclass(frozen=True)
class Speed:
    """Median times of writing and reading labels, on one thread."""

    write: float  # select and encode, over one torch.logsumexp of the same logits, interleaved with it
    decode: float  # tokens per second


def speed(codec: Codec, logits: Tensor, packed: PackedLabels, repeats: int) -> Speed:
    """Time ``codec`` on ``logits``, (rows, vocab) float32, and the decoding of ``packed``, after a round of each."""

    def write() -> None:
        codec.encode(codec.select(logits, bytes(16)))

    def logsumexp() -> None:
        torch.logsumexp(logits, 1)

    with one_thread():
        times = [(_seconds(write), _seconds(logsumexp)) for _ in range(repeats + 1)][1:]
        decode = [_seconds(packed.unpack) for _ in range(repeats + 1)][1:]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return Speed(ours / theirs, len(packed) / statistics.median(decode))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which PyTorch uses one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
