"""What the examples share: a small language model with its loss inside, a teacher, and text to learn from."""

from __future__ import annotations

import pydoc_data.topics

import torch
from torch import Tensor, nn

from kdfast import Head, SoftLabels, kd_loss

VOCAB, LENGTH = 256, 64  # bytes as tokens


class LanguageModel(nn.Module):
    """A recurrent network over bytes. Its loss is computed inside, where a sharded weight is whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        states: Tensor = self.body(self.embed(ids))[0]
        return states

    def forward(self, ids: Tensor, teacher: SoftLabels, labels: Tensor, num_items: Tensor) -> Tensor:
        head = Head(self.hidden(ids), self.head.weight)
        loss: Tensor = kd_loss(head, teacher, labels, ce_weight=0.5, shift=True, num_items=num_items)
        return loss


def batches(rank: int, steps: int, device: torch.device, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each step: every process has windows of its own, and some of them are prompts."""
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    generator = torch.Generator().manual_seed(rank)
    starts = torch.randint(0, len(text) - LENGTH, (steps, size), generator=generator)
    ids = torch.tensor([[list(text[start : start + LENGTH]) for start in step] for step in starts.tolist()])
    labels = ids.clone()
    labels[:, : rank + 1, : LENGTH // 2] = -100
    return [(x.to(device), y.to(device)) for x, y in zip(ids, labels, strict=True)]


@torch.no_grad()
def label(teacher: LanguageModel, ids: Tensor) -> SoftLabels:
    """The teacher's eight likeliest bytes at every position, and the mass of the others."""
    log_probs = teacher.head(teacher.hidden(ids)).flatten(0, 1).float().log_softmax(-1)
    top, which = log_probs.topk(8)
    return SoftLabels.topk(which, top, torch.log1p(-top.exp().sum(-1))[None], vocab_size=VOCAB)
