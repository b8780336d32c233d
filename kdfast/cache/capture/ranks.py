"""Sharing one capture among several processes: ``capture_share``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from kdfast.cache.capture.lm import capture_lm
from kdfast.cache.capture.report import CaptureReport
from kdfast.cache.codecs.base import PREPARE_ROWS
from kdfast.cache.write.salvage import salvage

__all__ = ["Ranks", "capture_share"]

T = TypeVar("T")
# A process waits as long for the first one, which learns prototypes before the others begin.
PATIENCE = timedelta(hours=12)


class Ranks(NamedTuple):
    """The number of this process and how many there are: ``torchrun``'s, or 0 and 1 without it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Ranks:
        """Read ``RANK`` and ``WORLD_SIZE``, which ``torchrun`` sets."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def writer(self) -> str:
        """The writer name ``<rank>of<world>``, so that runs with another world size never resume this rank's shard."""
        return f"{self.rank}of{self.world}"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``world``-th item, from number ``rank`` on."""
        return items[self.rank :: self.world]


def capture_share(
    model: Any, tokenizer: Any, corpus: Sequence[Tensor], path: str | os.PathLike[str], ranks: Ranks, **options: Any
) -> CaptureReport:
    """``capture_lm`` of this process's windows into a cache that all of them write, each with a writer of its own.

    Started again with as many processes, each resumes where it was, byte for byte. With another number, the shards that
    the earlier ones have left unsealed are sealed first, and every process skips what any of them has stored.

    Args:
        corpus: all windows, the same list on every process (``windows`` makes it).
        options: ``capture_lm``'s.
    """
    share, arguments = ranks.share(corpus), {**options, "writer": ranks.writer}
    with _together(ranks) as wait:
        if ranks.rank == 0:
            salvage(path, keep=[Ranks(rank, ranks.world).writer for rank in range(ranks.world)])
        wait()
        first = None
        if ranks.rank == 0 and ranks.world > 1:
            # One table of prototypes for all: who learns it stores some records, and it with them.
            first = capture_lm(model, tokenizer, _rows(share, PREPARE_ROWS), path, **arguments)
        wait()
        report = capture_lm(model, tokenizer, share, path, **arguments)
        return report if first is None else _both(first, report)


def _both(first: CaptureReport, rest: CaptureReport) -> CaptureReport:
    """One report of a capture of some windows and of all of them after that, which knew what the first one added."""
    batches, _, records, rows = first
    before = CaptureReport(batches, 0, records, rows, known=-records, measured=first.measured)
    return CaptureReport.total([rest, before])


def _rows(windows: Sequence[Tensor], count: int) -> Sequence[Tensor]:
    """The first windows that have ``count`` rows together, or all of them."""
    rows = 0
    for i, ids in enumerate(windows):
        if rows >= count:
            return windows[:i]
        rows += len(ids)
    return windows


@contextmanager
def _together(ranks: Ranks) -> Iterator[Any]:
    if ranks.world == 1:
        yield lambda: None
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield dist.barrier
    finally:
        dist.destroy_process_group()
