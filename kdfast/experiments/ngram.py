"""A teacher that counts: n-grams of characters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NGram"]


class NGram(nn.Module):
    """Witten-Bell's interpolation of n-grams up to ``order`` (Witten & Bell 1991), lower orders first::

        p_k(c | h) = (count(h, c) + kinds(h) p_{k-1}(c | h)) / (count(h) + kinds(h))

    where ``h`` is the last k characters, ``kinds(h)`` the number of different characters seen after it, and p_{-1} is
    uniform. Forward takes (rows, context) ids, context >= order - 1, and gives (rows, alphabet) log-probabilities.

    Args:
        contexts, following: (n, context) ids and the (n,) ids that come next, which are counted.
        alphabet: how many ids there are; ``alphabet**order`` must fit into int64.
    """

    def __init__(self, contexts: Tensor, following: Tensor, *, alphabet: int, order: int = 5) -> None:
        super().__init__()
        self.alphabet, self.order = alphabet, order
        for k in range(order):
            codes, counts = torch.unique(_code(contexts, k, alphabet) * alphabet + following, return_counts=True)
            self.register_buffer(f"codes{k}", codes)
            self.register_buffer(f"counts{k}", counts)

    def forward(self, contexts: Tensor) -> Tensor:
        p = torch.full((len(contexts), self.alphabet), 1.0 / self.alphabet)
        for k in range(self.order):
            counts = self._counts(contexts, k).float()
            kinds = (counts > 0).sum(1, keepdim=True).clamp(min=1)  # an unseen context leaves p as it is
            p = (counts + kinds * p) / (counts.sum(1, keepdim=True) + kinds)
        return p.log()

    def _counts(self, contexts: Tensor, k: int) -> Tensor:
        """(rows, alphabet): how often each character followed the last k."""
        known, counts = self.get_buffer(f"codes{k}"), self.get_buffer(f"counts{k}")
        wanted = _code(contexts, k, self.alphabet)[:, None] * self.alphabet + torch.arange(self.alphabet)
        place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        return torch.where(known[place] == wanted, counts[place], 0)


def _code(contexts: Tensor, k: int, alphabet: int) -> Tensor:
    """(rows,) int64: the last k ids as one number."""
    code = torch.zeros(len(contexts), dtype=torch.int64)
    for column in range(contexts.shape[1] - k, contexts.shape[1]):
        code = code * alphabet + contexts[:, column]
    return code
