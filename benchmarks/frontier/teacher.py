"""The benchmark's teacher, and all of its logits in one file: computing them takes longer than training a student."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from kdfast.bench.teacher import LEARN_WINDOWS, LENGTH, Corpus, load_teacher

__all__ = ["HELD_OUT_WINDOWS", "LENGTH", "TRAIN_WINDOWS", "CorpusWithLogits", "load"]

TRAIN_WINDOWS = LEARN_WINDOWS
HELD_OUT_WINDOWS = 66  # the last ones


@dataclass(frozen=True)
class CorpusWithLogits(Corpus):
    """A corpus whose logits lie in a file.

    Attributes:
        table: (windows, length, vocab) float32, mapped; only the windows that are used are filled.
    """

    table: Tensor

    def logits(self, windows: Tensor | slice) -> Tensor:
        return self.table[windows].reshape(-1, self.vocab_size)


def load(folder: Path) -> CorpusWithLogits:
    """Read the corpus and its logits from ``folder``; where they are missing, compute and write them, 11 GB."""
    corpus = load_teacher(folder / "teacher.safetensors")
    path = folder / "logits.f32"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        table = _map(part, corpus)
        for window in (*range(TRAIN_WINDOWS), *range(len(corpus) - HELD_OUT_WINDOWS, len(corpus))):
            table[window] = corpus.logits(slice(window, window + 1))
        part.rename(path)
    return CorpusWithLogits(**{f.name: getattr(corpus, f.name) for f in fields(corpus)}, table=_map(path, corpus))


def _map(path: Path, corpus: Corpus) -> Tensor:
    shape = (len(corpus), LENGTH, corpus.vocab_size)
    size = shape[0] * shape[1] * shape[2]
    return torch.from_file(str(path), shared=True, size=size).view(shape)
