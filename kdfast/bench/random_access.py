"""Timing random access to single rows of a large cache: opening, gathering, memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import kdfast.cache
from kdfast.cache.write.builder import BLOCK_ROWS
from kdfast.labels import SoftLabels

__all__ = ["RandomAccess", "random_access"]

VOCAB = 49_152
DRAWS = 23
BATCHES = (512, 4096)
POOL = 65_536  # distinct rows, which the records repeat
GATHERS = 32  # of each batch size


@dataclass(frozen=True)
class RandomAccess:
    """Times of a cache with one row per record, ``coding="rows"`` and ``keys="range"``, read in its own process."""

    records: int
    file_bytes: int
    write_seconds: float
    open_seconds: float
    first_records_per_s: float  # before any block has been read: the first use of a block checks all of it
    records_per_s: dict[int, float]  # after that, by batch size: the median gather; labels decoded, one thread
    anonymous_bytes: int | None  # how much the reading process has grown by, mapped files apart; None: not on Linux


def random_access(folder: Path, records: int, advance: Callable[[int], None] = lambda done: None) -> RandomAccess:
    """Write ``records`` made-up rows of the codec ``sample`` to ``folder``, and read them in random order."""
    start = time.perf_counter()
    pool = _rows(min(records, POOL))
    with kdfast.cache.Writer(
        folder, vocab_size=VOCAB, codec="sample", draws=DRAWS, coding="rows", keys="range"
    ) as writer:
        for i in range(records):
            writer.add_labels(i, pool[i % len(pool)])
            if not (i + 1) % 10_000:
                advance(10_000)
    seconds = time.perf_counter() - start
    # A process that has just written would serve new memory from what it has freed: growth would not show.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        opened, first, rates, grown = child.submit(_read, folder, records).result()
    size = sum(file.stat().st_size for file in folder.iterdir())
    return RandomAccess(records, size, seconds, opened, first, rates, grown)


def _rows(count: int) -> list[SoftLabels]:
    """Rows drawn from a distribution as heavy-tailed as words', with about as many distinct ids as a teacher gives."""
    rng = np.random.default_rng(0)
    ranks = np.exp(rng.random((count, DRAWS)) ** 2 * math.log(VOCAB)).astype(np.int64) - 1
    rows = []
    for drawn in ranks:
        ids, times = np.unique(drawn, return_counts=True)
        weights = torch.from_numpy((times / DRAWS).astype(np.float32))[None]
        rows.append(SoftLabels.weights(torch.from_numpy(ids)[None], weights, vocab_size=VOCAB))
    return rows


def _read(folder: Path, records: int) -> tuple[float, float, dict[int, float], int | None]:
    torch.set_num_threads(1)
    before = _anonymous()
    start = time.perf_counter()
    cache = kdfast.cache.open(folder)
    opened = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    first = _rate(cache, records, BATCHES[0], generator)
    for keys in torch.split(torch.arange(0, records, BLOCK_ROWS // 2), BATCHES[-1]):  # something of every block
        cache.gather(cache.index(keys))
    rates = {batch: _rate(cache, records, batch, generator) for batch in BATCHES}
    after = _anonymous()
    return opened, first, rates, None if before is None or after is None else after - before


def _rate(cache: kdfast.cache.CacheReader, records: int, batch: int, generator: torch.Generator) -> float:
    seconds = []
    for _ in range(GATHERS + 1):
        keys = torch.randint(records, (batch,), generator=generator)
        start = time.perf_counter()
        cache.gather(cache.index(keys))
        seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds[1:])


def _anonymous() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
