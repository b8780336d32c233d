"""Few labels of text: the next character in Python's help topics, from a teacher that counts n-grams."""

from __future__ import annotations

from functools import lru_cache
from pydoc_data.topics import topics

import torch
from torch import Generator, Tensor, nn

from kdfast.demo import models
from kdfast.experiments.settings import Settings
from kdfast.experiments.tasks import CLEAN, Labelled, Task

__all__ = ["CONTEXT", "NGram", "TextTask", "few_characters"]


class NGram(nn.Module):
    """A character model that interpolates n-grams up to ``order`` (Witten & Bell 1991), lower orders first::

        p_k(c | h) = (count(h, c) + kinds(h) p_{k-1}(c | h)) / (count(h) + kinds(h))

    where ``h`` is the last k characters, ``kinds(h)`` the number of different characters seen after it, and p_{-1} is
    uniform. ``forward`` takes (rows, context) ids, context >= order - 1, and returns (rows, alphabet)
    log-probabilities.

    Args:
        contexts, following: (n, context) ids, and the (n,) ids that come next. They are counted here.
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


# ---- the task -------------------------------------------------------------------------------------------------------


CONTEXT = 8  # characters that a student sees
ALPHABET = 97  # printable ASCII, the newline, and one for all others
SHARES = (0.7, 0.8)  # training, validation and test text end here, at the end, and follow one another
LABELS, INPUTS, TESTED = 2_000, 20_000, 4_000  # windows


class TextTask(Task):
    """A task of text, whose student is an MLP over embeddings, and whose teacher counts n-grams."""

    def student(self, offset: int = 0) -> nn.Module:
        return models.build(_student, self.seed + 10_000 * offset, "cpu")

    def teach(self, examples: Labelled, offset: int = 0) -> nn.Module:
        return NGram(*examples, alphabet=ALPHABET)


def few_characters(seed: int, settings: Settings, *, validation: bool) -> Task:
    """The task of 2000 labelled windows of text, and a teacher that has counted all of the training text."""
    train, tuning, test = _texts()
    generator = Generator().manual_seed(seed)
    inputs, following = _draw(train, INPUTS, generator)
    tested = _draw(tuning if validation else test, TESTED, Generator().manual_seed(0))
    labelled = inputs[:LABELS], following[:LABELS]
    return TextTask(seed, settings, labelled, inputs, train, (inputs, following), {CLEAN: tested})


def _student() -> nn.Module:
    """30,577 parameters."""
    return nn.Sequential(
        nn.Embedding(ALPHABET, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 128), nn.ReLU(), nn.Linear(128, ALPHABET)
    )


@lru_cache(maxsize=1)
def _texts() -> tuple[Labelled, Labelled, Labelled]:
    """Every window of the training, the validation and the test text, and what follows it."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor([_id(character) for character in text])
    first, second = (round(share * len(ids)) for share in SHARES)
    return tuple(_windows(part) for part in (ids[:first], ids[first:second], ids[second:]))  # type: ignore[return-value]


def _id(character: str) -> int:
    if character == "\n":
        return 95
    return ord(character) - 32 if " " <= character <= "~" else 96


def _windows(ids: Tensor) -> Labelled:
    return ids[:-1].unfold(0, CONTEXT, 1), ids[CONTEXT:]


def _draw(windows: Labelled, count: int, generator: Generator) -> Labelled:
    rows = torch.randperm(len(windows[0]), generator=generator)[:count]
    return windows[0][rows], windows[1][rows]
