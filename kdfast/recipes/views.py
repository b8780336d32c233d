"""Augmented samples with cached labels: the teacher sees V views of each, and the student exactly these.

    augment = partial(crop_and_flip, size=(32, 32))
    capture_views(teacher, names, images, path, augment=augment, vocab_size=10, views=8)

    cache = kdfast.cache.open(path)
    examples = ViewedExamples(cache, names, images, augment)
    data = kdfast.cache.CacheDataset(cache, examples.keys, examples)  # (batch, labels) for a DataLoader

A record is a sample, its rows are the views (FKD, Shen & Xing 2022). The articles augment and cache independently: then
a label describes a picture that the student never sees.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.cache.capture.capture import CaptureReport, capture
from kdfast.cache.errors import CacheMismatchError
from kdfast.cache.format.keys import describe
from kdfast.cache.format.view import View
from kdfast.cache.read.reader import CacheReader
from kdfast.models import device_of, logits_of, move
from kdfast.recipes.augmentation import random_view

__all__ = ["ViewedExamples", "capture_views", "view_span"]

Augment = Callable[[Any, View], Tensor]  # of a sample, by nothing but the view


def capture_views(
    model: Callable[..., Any],
    keys: Sequence[Any],
    samples: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    augment: Augment,
    vocab_size: int,
    views: int = 4,
    draw: Callable[[Any, int], View] = random_view,
    batch_size: int = 64,
    **options: Any,
) -> CaptureReport:
    """``kdfast.cache.capture`` of ``views`` views of each sample: a record per key, a row per view.

    Args:
        model: the teacher, of a batch of augmented samples.
        keys: a name, or ids, per sample.
        samples: what ``augment`` takes: images, token ids.
        path: the cache's directory.
        augment: a tensor of a sample and a view, that depends on nothing else.
        vocab_size: columns of the logits.
        views: per sample.
        draw: a view of a key and 0 ... views - 1, the same whenever it is asked.
        batch_size: samples per batch; the teacher sees ``views`` times as many.
        options: ``capture``'s and the codec's.

    Raises:
        ValueError: keys and samples differ in number, or no views; and what ``capture`` raises.
    """
    if len(keys) != len(samples) or views < 1:
        raise ValueError(
            f"each sample needs a key and a view: got {len(samples)} samples, {len(keys)} keys, {views} views"
        )
    drawn = [[draw(key, number) for number in range(views)] for key in keys]
    batches = [range(at, min(at + batch_size, len(keys))) for at in range(0, len(keys), batch_size)]
    return capture(
        model,
        batches,
        path,
        vocab_size=vocab_size,
        key=lambda batch: [keys[i] for i in batch],
        inputs=lambda batch: move(_stack(augment, samples, drawn, batch), device_of(model)),
        outputs=lambda output, batch: logits_of(output).unflatten(0, (len(batch), views)),
        views=lambda batch: [drawn[i] for i in batch],
        **options,
    )


class ViewedExamples(Sequence[Any]):
    """Each sample under each view that the cache has of it: the examples of a ``CacheDataset``.

    Args:
        cache: of ``capture_views``.
        keys, samples, augment: those that it was captured with.
        labels: per sample, if any: an example is then (augmented sample, label).

    Attributes:
        keys: the example's span in the cache: (key, number of the view, 1).
        views: per sample its views.

    Raises:
        KeyError: a key is not in the cache.
        CacheError: the cache was written without views.
        ValueError: keys, samples or labels differ in number.
    """

    def __init__(
        self,
        cache: CacheReader,
        keys: Sequence[Any],
        samples: Sequence[Any],
        augment: Augment,
        labels: Sequence[Any] | Tensor | None = None,
    ) -> None:
        for name, values in (("samples", samples), ("labels", labels)):
            if values is not None and len(values) != len(keys):
                raise ValueError(f"{len(keys)} keys need as many {name}, got {len(values)}")
        self.views = [cache.views(key) for key in keys]
        self.keys = [
            (key, number, 1) for key, views in zip(keys, self.views, strict=True) for number in range(len(views))
        ]
        self._place = [(i, view) for i, views in enumerate(self.views) for view in views]
        self._samples, self._augment, self._labels = samples, augment, labels

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, position: Any) -> Any:
        sample, view = self._place[position]
        augmented = self._augment(self._samples[sample], view)
        return augmented if self._labels is None else (augmented, self._labels[sample])


def view_span(cache: CacheReader, key: Any, view: View) -> tuple[Any, int, int]:
    """Where the labels of a sample under ``view`` are: ``cache.gather([view_span(cache, key, view)])``.

    For a student's loader that draws views itself, by the function that the capture had.

    Raises:
        CacheMismatchError: the teacher has not seen the sample so; the message names key and view.
        KeyError: the key is not in the cache.
        CacheError: the cache was written without views.
    """
    known = cache.views(key)
    if view not in known:
        raise CacheMismatchError(
            f"the teacher has not seen {describe(key)} under {view}: the cache has {len(known)} views of it, the first "
            f"of them {known[0] if known else None}"
        )
    return key, known.index(view), 1


def _stack(augment: Augment, samples: Sequence[Any], views: list[list[View]], batch: range) -> Tensor:
    return torch.stack([augment(samples[i], view) for i in batch for view in views[i]])
