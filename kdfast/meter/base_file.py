"""llama.cpp's base file: what ``llama-perplexity --kl-divergence-base`` writes of a teacher.

All numbers are little-endian: ``_logits_``; context length, columns and chunks as 32-bit integers; the tokens of all
chunks, int32; and of each chunk the rows of its second half but the last token, for which the context is long. A row is
a scale and the smallest log-probability, float32, and a uint16 v per column, padded to an even number of them: the
log-probability is ``smallest + scale * v``. It spans at most 16 nats.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache import CacheError
from kdfast.meter.estimate import Rows
from kdfast.models import call, device_of, evaluating, logits_of

__all__ = ["BaseFile"]

MAGIC, HEADER = b"_logits_", 20
LOWEST = -16.0  # nats: what llama.cpp leaves out of its sums, as less likely ids share one number
ROWS = 64  # at a time


class BaseFile:
    """A base file open for reading. Its rows are mapped, not read; sizes are checked against the file's length first.

    Raises:
        CacheError: the file is no base file, or is cut short; the message says where.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(HEADER)
        if len(head) < HEADER or head[:8] != MAGIC:
            raise CacheError(f"{self.path}: is no base file of llama-perplexity: it does not begin with _logits_")
        self.context, self.vocab_size, self.chunks = struct.unpack("<3I", head[8:])
        if self.context < 4 or not 1 <= self.vocab_size <= 2**24 or not self.chunks:
            raise CacheError(
                f"{self.path}: claims {self.chunks} chunks of {self.context} tokens, {self.vocab_size} columns"
            )
        self._first = self.context // 2
        self._width = 4 + 2 * ((self.vocab_size + 1) // 2)
        self._rows_at = HEADER + 4 * self.context * self.chunks
        wanted = self._rows_at + 2 * self._width * self.rows_per_chunk * self.chunks
        if size < wanted:
            raise CacheError(
                f"{self.path}: {size} bytes, and {self.chunks} chunks of {self.context} tokens and {self.vocab_size} "
                f"columns take {wanted}: it was cut short, so write it again"
            )

    @property
    def rows_per_chunk(self) -> int:
        """How many tokens of a chunk are measured: those after its first half that have a next one."""
        return self.context - 1 - self._first

    def __len__(self) -> int:
        return self.chunks

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """(chunks, context)."""
        return np.memmap(self.path, "<i4", "r", HEADER, (self.chunks, self.context))

    def log_probs(self, chunk: int) -> Iterator[tuple[int, Tensor]]:
        """(rows, vocab) float32 of a chunk, some rows at a time, each part with its first position in the chunk."""
        at = self._rows_at + 2 * self._width * self.rows_per_chunk * chunk
        packed = np.memmap(self.path, "<u2", "r", at, (self.rows_per_chunk, self._width))
        for begin in range(0, self.rows_per_chunk, ROWS):
            part = np.ascontiguousarray(packed[begin : begin + ROWS])
            scale, smallest = np.ascontiguousarray(part[:, :4]).view("<f4").T
            if not (np.isfinite(scale) & np.isfinite(smallest)).all():
                raise CacheError(f"{self.path}: chunk {chunk} has numbers that are not finite")
            levels = part[:, 4 : 4 + self.vocab_size].astype(np.float32)
            yield self._first + begin, torch.from_numpy(levels * scale[:, None] + smallest[:, None])

    @cached_property
    def cross_entropy(self) -> float:
        """The teacher's on the next tokens, in nats, mean over all rows."""
        total = 0.0
        for chunk in range(self.chunks):
            for first, log_probs in self.log_probs(chunk):
                following = torch.from_numpy(
                    self.tokens[chunk, first + 1 : first + 1 + len(log_probs)].astype(np.int64)
                )
                total -= float(log_probs.gather(1, following[:, None]).double().sum())
        return total / (self.chunks * self.rows_per_chunk)

    def rows(self, model: Any, progress: Callable[[], object] | None = None) -> Rows:
        """Run ``model`` over every chunk; ``kdfast.meter.measure`` calls this.

        Raises:
            ValueError: the model's logits have other columns.
        """
        parts = []
        with evaluating(model), torch.no_grad():
            for chunk in range(self.chunks):
                parts.append(self._measure(model, chunk))
                if progress is not None:
                    progress()
        return Rows.cat(parts)

    def _measure(self, model: Any, chunk: int) -> Rows:
        ids = torch.from_numpy(self.tokens[chunk].astype(np.int64))[None]
        logits = logits_of(call(model, ids.to(device_of(model) or ids.device)), "the model")
        if logits.shape != (1, self.context, self.vocab_size):
            raise ValueError(
                f"{self.path} has chunks of {self.context} tokens and {self.vocab_size} columns, the model gave logits "
                f"{tuple(logits.shape)}"
            )
        kl, agree, ce = [], [], []
        for first, log_p in self.log_probs(chunk):
            log_q = logits[0, first : first + len(log_p)].float().log_softmax(1).cpu()
            p = torch.where(log_p > LOWEST, log_p.double().exp(), 0.0)
            kl.append((p * torch.where(p > 0, (log_p - log_q).double(), 0.0)).sum(1))
            agree.append(log_p.argmax(1) == log_q.argmax(1))
            following = ids[0, first + 1 : first + 1 + len(log_p)]
            ce.append(-log_q.gather(1, following[:, None])[:, 0].double())
        document = np.full(self.rows_per_chunk, chunk)
        return Rows(torch.cat(kl).numpy(), torch.cat(agree).numpy(), document, torch.cat(ce).numpy())
