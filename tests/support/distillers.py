"""Small students, teachers and data that the trainer's tests share."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, ROWS = 6, 4, 48


def data(rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    truth = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    return x, (x @ truth).argmax(1)


def loader(batch=8, rows=ROWS, shuffle=True, **options):
    return DataLoader(TensorDataset(*data(rows)), batch, shuffle=shuffle, **options)


def student(seed=1):
    """With batch norm and dropout: modes and random numbers matter."""
    torch.manual_seed(seed)
    layers = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers)


def teacher(seed=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, CLASSES))


def states_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def quick(monkeypatch):
    """Runs without pictures and without syncs to the disk."""
    monkeypatch.setattr("kdfast.distill.fitting.plot_curves", lambda *_: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
