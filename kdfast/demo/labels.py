"""The teacher's answers, written once and read by every student."""

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
    """Bytes per sample."""

    payload: float  # the labels themselves
    on_disk: float  # with keys, indices, checksums and the manifest
    float32: float  # the logits as they come from the teacher, without any key


def write(model: nn.Module, train: Split, folder: Path) -> Path:
    """Write ``model``'s answers on ``train``, one record per image, to a subfolder of ``folder`` named after the model.

    The key of a record is the image itself: its pixels, as ids. What an earlier run left is kept: other weights have
    another name, equal weights give equal answers, and the writer checks codec, vocabulary and fingerprint.

    Raises:
        kdfast.cache.CacheError: the subfolder holds something else, or a corrupt cache; the message names it.
    """
    name = f"digits-{fingerprint(model)}"
    with kdfast.cache.Writer(folder / name, vocab_size=CLASSES, codec="dense", teacher=name) as writer:
        if not all(key in writer for key in train.pixels):
            for key, logits in zip(train.pixels, logits_of(model, train.images), strict=True):
                writer.add(key, logits)
    return folder / name


def read(path: Path, train: Split) -> SoftLabels:
    """The labels of all training images, row by row, every byte checked."""
    cache = kdfast.cache.open(path)
    cache.verify()
    return cache.gather(train.pixels).to(train.images.device)


def size_of(path: Path) -> CacheSize:
    """What the cache at ``path`` takes per sample."""
    cache = kdfast.cache.open(path)
    files = sum(file.stat().st_size for file in path.iterdir())
    return CacheSize(cache.nbytes / len(cache), files / len(cache), 4.0 * CLASSES)
