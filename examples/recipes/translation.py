"""Translation: an encoder-decoder learns letters to phonemes, word by word of the teacher's distributions."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from kdfast import Distiller

LETTERS, END, PAD, LENGTH = "abehikst", 0, -100, 6
SOUNDS = ["", "sh", "th", "kh", *LETTERS]  # two letters that are one sound, and those that are their own


class Translator(nn.Module):
    """A GRU reads the letters backwards, another writes phonemes from where it ended."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters, self.phonemes = nn.Embedding(len(LETTERS) + 1, width), nn.Embedding(len(SOUNDS), width)
        self.encoder, self.decoder = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, len(SOUNDS))

    def forward(self, source: Tensor, previous: Tensor) -> Tensor:
        state = self.encoder(self.letters(source.flip(1)))[1]
        return self.head(self.decoder(self.phonemes(previous), state)[0])


def dictionary(count: int) -> dict[str, Tensor]:
    """Padded: letters, the phonemes before each, and those to be written."""
    lengths = torch.randint(3, LENGTH + 1, (count,)).tolist()
    words = ["".join(LETTERS[i] for i in torch.randint(len(LETTERS), (n,))) for n in lengths]
    source = torch.tensor([[LETTERS.index(c) + 1 for c in word] + [0] * (LENGTH - len(word)) for word in words])
    labels = torch.full((count, LENGTH + 1), PAD)
    for row, word in zip(labels, words, strict=True):
        sounds = [SOUNDS.index(sound) for sound in re.findall("sh|th|kh|.", word)]
        row[: len(sounds) + 1] = torch.tensor([*sounds, END])
    previous = nn.functional.pad(labels[:, :-1].clamp(min=END), (1, 0))
    return {"source": source, "previous": previous, "labels": labels}


@torch.no_grad()
def accuracy(model: nn.Module, words: dict[str, Tensor]) -> float:
    """The share of words of which every phoneme is right, written one after another."""
    labels, written = words["labels"], torch.zeros(len(words["labels"]), 1, dtype=torch.long)
    for _ in range(labels.shape[1]):
        written = torch.cat([written, model(words["source"], written)[:, -1:].argmax(-1)], 1)
    return float(((written[:, 1:] == labels) | (labels == PAD)).all(1).float().mean())


def main() -> None:
    torch.manual_seed(0)
    words, test = dictionary(4096), dictionary(256)
    batches = [dict(zip(words, part, strict=True)) for part in zip(*(x.split(64) for x in words.values()), strict=True)]
    teacher, alone, student = Translator(64), Translator(24), Translator(24)
    Distiller(teacher, lr=1e-2).fit(batches, epochs=6, progress=False)
    Distiller(alone, lr=1e-2).fit(batches[:8], epochs=32, progress=False)
    distiller = Distiller(student, teacher, temperature=2.0, kd_weight=0.9, ce_weight=0.1, ignore_index=PAD, lr=1e-2)
    distiller.fit(batches, epochs=4, progress=False)
    scores = [accuracy(model, test) for model in (teacher, alone, student)]
    print("words without a mistake: teacher {:.3f}, 512 words {:.3f}, distilled {:.3f}".format(*scores))


if __name__ == "__main__":
    main()
