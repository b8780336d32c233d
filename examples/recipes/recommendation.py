"""Recommendation: a matrix factorisation of rank 2 learns the order of unseen items from one of rank 16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast import Distiller
from kdfast.distill import Step
from kdfast.recipes import listwise_kd, ranking_distillation

USERS, ITEMS, RANK, TOP = 256, 120, 4, 10


class Factors(nn.Module):
    """The scores of all items for each user."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, rank), nn.Embedding(ITEMS, rank)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, users: Tensor) -> Tensor:
        return self.users(users) @ self.items.weight.T


def main() -> None:
    torch.manual_seed(0)
    taste = torch.randn(USERS, RANK) @ torch.randn(RANK, ITEMS)
    seen = torch.zeros(USERS, ITEMS, dtype=torch.bool)
    seen.scatter_(1, taste.softmax(-1).multinomial(12), True)  # what users have taken
    clicks = seen.nonzero()
    order = torch.randperm(len(clicks))
    batches = [(clicks[part, 0], clicks[part, 1]) for part in order.split(128)]

    def distilled(step: Step) -> Tensor:
        unseen = ~seen[step.batch[0]]
        listwise = listwise_kd(step.logits, step.teacher, candidates=unseen, temperature=2.0)
        taken = nn.functional.cross_entropy(step.logits, step.labels)
        return taken + listwise + ranking_distillation(step.logits, step.teacher, k=TOP, candidates=unseen)

    teacher, alone, student = Factors(16), Factors(2), Factors(2)
    for model in (teacher, alone):
        Distiller(model, lr=1e-2).fit(batches, epochs=20, progress=False)
    Distiller(student, teacher, objective=distilled, lr=1e-2).fit(batches, epochs=20, progress=False)
    everybody = torch.arange(USERS)
    best = taste.masked_fill(seen, -torch.inf).topk(TOP).indices
    with torch.no_grad():
        lists = [m(everybody).masked_fill(seen, -torch.inf).topk(TOP).indices for m in (teacher, alone, student)]
    recall = [float((found[:, :, None] == best[:, None]).any(1).float().mean()) for found in lists]
    print("recall@10 of unseen items: teacher {:.3f}, student alone {:.3f}, distilled {:.3f}".format(*recall))


if __name__ == "__main__":
    main()
