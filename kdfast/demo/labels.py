"""The cache of the teacher's soft labels, written once and read by every student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

import kdfast.cache
from kdfast import SoftLabels
from kdfast.demo.data import CLASSES, Split
from kdfast.demo.models import fingerprint, logits_of

__all__ = ["CacheSize", "read", "size_of", "write"]


@dataclass(frozen=True)
class CacheSize:
    """Size of a cache in bytes per sample.

    Attributes:
        payload: the labels themselves.
        on_disk: all files: with keys, indices, checksums and the manifest.
        float32: the teacher's logits in float32, without a key, for comparison.
    """

    payload: float
    on_disk: float
    float32: float


def write(model: nn.Module, train: Split, folder: Path) -> Path:
    """Write a model's soft labels of ``train`` to a cache, one record per image. Returns the cache's folder.

    The folder is inside ``folder`` and named after the model's fingerprint. A record's key is the image: its pixels, as
    ids. A cache that an earlier run has left is used again, for equal weights give equal labels.

    Raises:
        kdfast.cache.CacheError: the folder holds something else, or a corrupt cache; the message names it.
    """
    name = f"digits-{fingerprint(model)}"
    with kdfast.cache.Writer(folder / name, vocab_size=CLASSES, codec="dense", teacher=name) as writer:
        if not all(key in writer for key in train.pixels):
            for key, logits in zip(train.pixels, logits_of(model, train.images), strict=True):
                writer.add(key, logits)
    return folder / name


def read(path: Path, train: Split) -> SoftLabels:
    """Read the soft labels of all training images, a row per image. Every checksum is checked."""
    cache = kdfast.cache.open(path)
    cache.verify()
    return cache.gather(train.pixels).to(train.images.device)


def size_of(path: Path) -> CacheSize:
    """Measure what the cache at ``path`` takes per sample."""
    cache = kdfast.cache.open(path)
    files = sum(file.stat().st_size for file in path.iterdir())
    return CacheSize(cache.nbytes / len(cache), files / len(cache), 4.0 * CLASSES)
