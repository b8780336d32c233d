"""Augmented images with cached labels: the teacher runs once on 8 views of each digit, and the student sees these."""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

import kdfast.cache
from kdfast import Distiller
from kdfast.cache import CacheDataset, CacheMismatchError, View
from kdfast.recipes import ViewedExamples, capture_views, crop_and_flip, random_view, view_span

LABELLED = 100
augment = partial(crop_and_flip, size=(8, 8), noise=0.05)
draw = partial(random_view, smallest=0.75, flip=False)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def main() -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(digits)
    names = [f"digit {i}" for i in range(LABELLED)]
    test = [(images[1200:], labels[1200:])]
    teacher, alone, student = network(256), network(16), network(16)
    batches = list(zip(images[:1200].split(50), labels[:1200].split(50), strict=True))
    Distiller(teacher, lr=3e-3).fit(batches, epochs=10, progress=False)

    with tempfile.TemporaryDirectory() as path:
        options = {"augment": augment, "draw": draw, "vocab_size": 10, "views": 8, "progress": False}
        capture_views(teacher, names, images[:LABELLED], path, **options)
        cache = kdfast.cache.open(path)
        examples = ViewedExamples(cache, names, images[:LABELLED], augment, labels[:LABELLED])
        data = CacheDataset(cache, examples.keys, examples)
        loader = DataLoader(data, batch_size=50, shuffle=True, collate_fn=data.collate)
        Distiller(student, temperature=2.0, lr=5e-3).fit(loader, epochs=20, progress=False)
        try:
            view_span(cache, names[0], View(flip=True))
        except CacheMismatchError as error:
            print(f"refused: {error}")
    few = [(images[:LABELLED], labels[:LABELLED])]
    Distiller(alone, lr=5e-3).fit(few * 16, epochs=20, progress=False)
    with torch.no_grad():
        scores = [
            float((model(test[0][0]).argmax(1) == test[0][1]).float().mean()) for model in (teacher, alone, student)
        ]
    print("accuracy: teacher {:.3f}, 100 labels {:.3f}, 100 images with 8 cached views {:.3f}".format(*scores))


if __name__ == "__main__":
    main()
