"""Runs of the trainer with everything that has a state, in this process or in one that is killed."""

import os
import random
import signal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import kdfast.cache
from kdfast import Distiller
from support.distillers import CLASSES, FEATURES, data, loader, student, teacher

EPOCHS, BATCHES = 3, 6


class Augmented(Dataset):
    """Every generator there is takes part in a sample."""

    def __init__(self):
        self.x, self.y = data(48)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = torch.randn(FEATURES) + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.x[i] + 0.1 * noise, self.y[i]


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(CLASSES, CLASSES)

    def forward(self, step):
        return nn.functional.mse_loss(self.layer(step.logits), step.teacher)


def elastic():
    dataset = Augmented()
    return DataLoader(dataset, batch_sampler=kdfast.cache.ElasticSampler(len(dataset), 8, seed=3))


LOADERS = {
    "default": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "generator": lambda: DataLoader(Augmented(), 8, shuffle=True, generator=torch.Generator().manual_seed(7)),
    "workers": lambda: DataLoader(Augmented(), 8, shuffle=True, num_workers=1),
    "elastic": elastic,
    "list": lambda: [data(8, seed) for seed in range(BATCHES)],
}


def run(folder, kind, tell=lambda calls: None, **options):
    """A run with everything that has a state. ``tell`` hears of every batch that the student is given."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model, objective = student(), Projected()
    calls = iter(range(1, 1000))
    model.register_forward_pre_hook(lambda *_: tell(next(calls)) if model.training else None)
    distiller = Distiller(
        model,
        teacher(),
        objective=objective,
        schedule="cosine",
        lr=0.01,
        folder=folder,
        accumulate=1 + (kind == "list"),
    )
    options = {"eval_loader": loader(rows=16), "metrics": ["accuracy"], "log_every": 1, "progress": False, **options}
    history = distiller.fit(LOADERS[kind](), epochs=EPOCHS, **options)
    return model, objective, history


def die_at(folder, kind, batch, every):
    def tell(calls):
        if calls == batch:
            os.kill(os.getpid(), signal.SIGKILL)

    run(folder, kind, tell, checkpoint_every=every)
