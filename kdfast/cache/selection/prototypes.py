"""``PrototypeTable``: typical distributions, one of which stands for the tail of each row, or orders its ids."""

from __future__ import annotations

from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor
from torch.nn.functional import embedding_bag

from kdfast.cache.selection.select import Thresholded, Top, threshold

__all__ = ["PrototypeTable"]

STEPS_PER_OCTAVE = 8  # of the stored logarithms: a probability is off by at most 4.4 %
ZERO = 255  # the code of a column without any probability
ASSIGN_TAU = 1 / 512  # a sample so fine finds prototypes whose labels' KL is 5e-4 nats above the best ones'
FAVOURITES = 64  # ids per prototype that lead its order: the likeliest ones, entries of the labels included


class PrototypeTable:
    """S distributions over V columns, as 8-bit logarithms, each with its likeliest ids.

    ``kdfast.cache.learn_prototypes`` makes it from a teacher's logits. A cache keeps it in one file beside its shards,
    named by ``digest``, and many caches may share one table.

    Args:
        codes: (S, V) uint8: column j has probability ``2 ** (-code / 8)`` up to the row's normalisation; 255 is 0.
        favourites: (S, M) uint32: distinct ids that lead each prototype's order.
    """

    def __init__(self, codes: NDArray[np.uint8], favourites: NDArray[np.uint32]) -> None:
        if codes.ndim != 2 or codes.dtype != np.uint8 or not codes.size:
            raise ValueError(f"codes must be (prototypes, vocab) uint8, got {codes.dtype} {codes.shape}")
        if favourites.ndim != 2 or len(favourites) != len(codes) or favourites.dtype != np.uint32:
            raise ValueError(f"favourites must be ({len(codes)}, M) uint32, got {favourites.dtype} {favourites.shape}")
        if (codes == ZERO).all(1).any():
            raise ValueError("a prototype has no probability anywhere")
        if favourites.size and int(favourites.max()) >= codes.shape[1]:
            raise ValueError(f"favourite {int(favourites.max())} is outside the vocabulary of {codes.shape[1]}")
        self.codes, self.favourites = np.ascontiguousarray(codes), np.ascontiguousarray(favourites)

    @classmethod
    def of(cls, tails: Tensor, means: Tensor) -> PrototypeTable:
        """Make a table of (S, V) tail distributions, and (S, V) mean distributions that say which ids are likeliest."""
        # Rows that their entries cover whole leave nothing to a tail: it is as good as uniform.
        tails = tails.double().masked_fill(tails.sum(1, keepdim=True) == 0, 1.0)
        log2 = tails.log2()
        codes = (-STEPS_PER_OCTAVE * (log2 - log2.amax(1, keepdim=True))).round().clamp(0, ZERO - 1)
        # However small a probability is, it stays one: at 0 it would make reverse KL infinite.
        codes = codes.masked_fill(tails == 0, ZERO)
        favourites = means.topk(min(FAVOURITES, means.shape[1]), dim=1).indices
        return cls(codes.to(torch.uint8).cpu().numpy(), favourites.cpu().numpy().astype(np.uint32))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def vocab_size(self) -> int:
        return self.codes.shape[1]

    @cached_property
    def table(self) -> Tensor:
        """(S, V) bfloat16 probabilities: what a loss reads."""
        value = torch.exp2(torch.arange(256, dtype=torch.float64) / -STEPS_PER_OCTAVE)
        value[ZERO] = 0
        rows = []
        for row in torch.from_numpy(self.codes):
            probs = value[row.long()]
            rows.append((probs / probs.sum()).bfloat16())
        return torch.stack(rows)

    @cached_property
    def log_table(self) -> Tensor:
        """(V, S) float32 natural logarithms of ``table``; where that is 0, the log of its smallest normal number."""
        return self.table.float().clamp(min=torch.finfo(torch.bfloat16).tiny).log().T.contiguous()

    @cached_property
    def order(self) -> NDArray[np.int32]:
        """(S, V): each prototype's ids, likeliest first: its favourites, then the others by code, then by id."""
        codes = self.codes.astype(np.int16)
        np.put_along_axis(codes, self.favourites.astype(np.int64), np.arange(self.favourites.shape[1]) - 1000, axis=1)
        return np.argsort(codes, axis=1, kind="stable").astype(np.int32)

    def to_bytes(self) -> bytes:
        """The table as a safetensors file with the tensors ``codes`` and ``favourites``."""
        return save({"codes": self.codes, "favourites": self.favourites})

    @classmethod
    def from_bytes(cls, data: bytes) -> PrototypeTable:
        """Read the file that ``to_bytes`` gave. Raises ``ValueError`` for other bytes."""
        try:
            tensors = load(data)
            return cls(tensors["codes"], tensors["favourites"])
        except Exception as error:  # safetensors' own error class is not a ValueError
            raise ValueError(f"is not a table of prototypes: {error}") from error

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that differ for each table: BLAKE2b-128 of ``to_bytes``."""
        return blake2b(self.to_bytes(), digest_size=16).hexdigest()

    @property
    def file_name(self) -> str:
        """The name of the table's file beside a cache's shards."""
        return f"shapes-{self.digest}.safetensors"

    def assign_rows(self, logits: Tensor, temperature: float, first_row: int, likeliest: Top) -> Tensor:
        """(rows,) int64: for each row the prototype whose label, with the entries ``likeliest``, is the closest to it.

        Args:
            logits: (rows, vocab).
            temperature: of the labels.
            first_row: the number of the first row, on which the sample of it depends that is looked at on a CPU.
            likeliest: the entries, and the probability of all other columns.
        """
        if logits.device.type == "cpu":
            drawn = threshold(logits, temperature=temperature, tau=ASSIGN_TAU, seed=0, first_row=first_row)
            return self.assign_drawn(drawn, likeliest.ids, likeliest.rest)
        return self.assign((logits.float() / temperature).softmax(1), likeliest.ids.long())

    def assign(self, probs: Tensor, ids: Tensor) -> Tensor:
        """(rows,) int64: for each row the prototype whose label is the closest to it in forward KL.

        Args:
            probs: (rows, vocab) probabilities.
            ids: (rows, K) entries, which the label holds exactly: the prototype stands for the other columns.
        """
        rest = probs.float().scatter(1, ids, 0.0)
        return self._best(rest @ self.log_table.to(probs.device), rest.sum(1), ids)

    def assign_drawn(self, drawn: Thresholded, ids: Tensor, rest: Tensor) -> Tensor:
        """``assign`` from an unbiased sample of each row, at a fraction of the cost: scores are expectations.

        Args:
            drawn: a sample of the whole rows.
            ids: (rows, K) entries.
            rest: (rows,) the probability of all other columns.
        """
        row = torch.repeat_interleave(drawn.counts.long())
        weights = drawn.probs.masked_fill((drawn.ids[:, None] == ids[row]).any(1), 0.0)
        begin = drawn.counts.cumsum(0, dtype=torch.int32) - drawn.counts
        score = embedding_bag(drawn.ids, self.log_table, begin, mode="sum", per_sample_weights=weights)
        return self._best(score, rest.float(), ids)

    def _best(self, score: Tensor, rest: Tensor, ids: Tensor) -> Tensor:
        # What a prototype has on the entries it loses there, and its other columns are scaled up for it: (rows, S).
        held = self.table.to(score.device).T[ids].float().sum(1)
        return (score - rest[:, None] * torch.log1p(-held.clamp(max=1 - 1e-6))).argmax(1)
