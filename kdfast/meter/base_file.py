"""llama.cpp's base file: what ``llama-perplexity --kl-divergence-base`` writes of a teacher.

All numbers are little-endian: ``_logits_``; context length, columns and chunks as 32-bit integers; the tokens of all
chunks, int32; and of each chunk the rows of its second half but the last token, for which the context is long. A row is
a scale and the smallest log-probability, float32, and a uint16 v per column, padded to an even number of them: the
log-probability is ``smallest + scale * v``. It spans at most 16 nats.

Where a model's texts begin with BOS, llama.cpp puts it in place of each chunk's first token while it runs the model,
and not in the file: there only the first chunk begins with it.
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
from kdfast.meter.models import bos_of
from kdfast.models import call, device_of, evaluating, logits_of

__all__ = ["BaseFile"]

MAGIC, HEADER = b"_logits_", 20
LOWEST = -16.0  # nats: what llama.cpp leaves out of its sums, as less likely ids share one number
ROWS = 64  # at a time


class BaseFile:
    """A base file open for reading. Its rows are mapped, not read; sizes are checked against the file's length first.

    Args:
        path: the file.
        bos: the id of the model's BOS; None asks the model. Where the file begins with it, every chunk is run with it
            for its first token, as llama.cpp does.

    Raises:
        CacheError: the file is no base file, is cut short, or has tokens that are no columns; the message says which.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], *, bos: int | None = None) -> None:
        self.path, self.bos = Path(path), bos
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
        low, high = int(self.tokens.min()), int(self.tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise CacheError(
                f"{self.path}: has tokens {low} to {high}, and {self.vocab_size} columns: it was damaged, so write it "
                "again"
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
        packed = self._packed(chunk)
        for begin in range(0, self.rows_per_chunk, ROWS):
            part = np.ascontiguousarray(packed[begin : begin + ROWS])
            scale, smallest = np.ascontiguousarray(part[:, :4]).view("<f4").T
            if not (np.isfinite(scale) & np.isfinite(smallest)).all():
                raise CacheError(f"{self.path}: chunk {chunk} has numbers that are not finite")
            levels = part[:, 4 : 4 + self.vocab_size].astype(np.float32)
            yield self._first + begin, torch.from_numpy(levels * scale[:, None] + smallest[:, None])

    def _packed(self, chunk: int) -> NDArray[np.uint16]:
        at = self._rows_at + 2 * self._width * self.rows_per_chunk * chunk
        return np.memmap(self.path, "<u2", "r", at, (self.rows_per_chunk, self._width))

    @cached_property
    def cross_entropy(self) -> float:
        """The teacher's on the next tokens, in nats, mean over all rows."""
        total = 0.0
        for chunk in range(self.chunks):  # three numbers of each row are read, not its columns
            packed, following = self._packed(chunk), self.tokens[chunk, self._first + 1 :].astype(np.int64)
            scale, smallest = np.ascontiguousarray(packed[:, :4]).view("<f4").T
            levels = packed[np.arange(len(packed)), 4 + following]
            total -= float((levels * scale.astype(np.float64) + smallest).sum())
        return total / (self.chunks * self.rows_per_chunk)

    def rows(self, model: Any, progress: Callable[[], object] | None = None) -> Rows:
        """Run ``model`` over every chunk; ``kdfast.meter.measure`` calls this.

        Raises:
            ValueError: the model's logits have other columns.
        """
        parts = []
        bos = bos_of(model) if self.bos is None else self.bos
        bos = bos if bos == int(self.tokens[0, 0]) else None
        with evaluating(model), torch.no_grad():
            for chunk in range(self.chunks):
                parts.append(self._measure(model, chunk, bos))
                if progress is not None:
                    progress()
        return Rows.cat(parts)

    def _measure(self, model: Any, chunk: int, bos: int | None) -> Rows:
        ids = torch.from_numpy(self.tokens[chunk].astype(np.int64))[None]
        if bos is not None:
            ids[0, 0] = bos
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
