"""Augmented text with cached labels: a record's key is the noisy ids themselves, so that other noise is not found."""

from __future__ import annotations

import pydoc_data.topics
import tempfile

import torch
from torch import Tensor, nn

import kdfast.cache
from kdfast import Distiller
from kdfast.cache import View
from kdfast.recipes import noise_tokens

VOCAB, LENGTH, VIEWS = 128, 32, 2


class LanguageModel(nn.Module):
    """A recurrent network over bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(VOCAB, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(input_ids))[0])


def noisy(windows: Tensor, seed: int) -> dict[str, Tensor]:
    """Each window with one in ten bytes replaced, as ``seed`` says."""
    return {"input_ids": torch.stack([noise_tokens(ids, View(seed=seed), vocab_size=VOCAB) for ids in windows])}


def main() -> None:
    torch.manual_seed(0)
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    windows = torch.tensor(list(text[: 3072 * LENGTH])).view(-1, LENGTH)[torch.randperm(3072)]
    held_out, labelled, unlabelled = windows[:256], windows[256:2048].split(64), windows[2048:].split(64)
    teacher, student = LanguageModel(64), LanguageModel(32)
    lessons = [{"input_ids": ids, "labels": ids} for ids in labelled]
    Distiller(teacher, shift=True, lr=5e-3).fit(lessons, epochs=3, progress=False)

    with tempfile.TemporaryDirectory() as path:
        loader = [noisy(ids, seed) for seed in range(VIEWS) for ids in unlabelled]
        kdfast.cache.capture(teacher, loader, path, vocab_size=VOCAB, progress=False)
        distiller = Distiller(student, kdfast.cache.open(path), temperature=1.0, kd_weight=1.0, ce_weight=0.0, lr=5e-3)
        distiller.fit(loader, epochs=3, progress=False)
        try:
            distiller.step(noisy(unlabelled[0], VIEWS))
        except KeyError as error:
            print(f"refused: {error}")
    with torch.no_grad():
        losses = [
            float(nn.functional.cross_entropy(m(held_out)[:, :-1].mT, held_out[:, 1:])) for m in (teacher, student)
        ]
    print("held-out nats per byte: teacher {:.3f}, student {:.3f}, knowing nothing 4.852".format(*losses))


if __name__ == "__main__":
    main()
