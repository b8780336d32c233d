"""Augmented samples with cached labels: the teacher labels several views of each, and the student sees just these.

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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdfast.cache.capture.capture import CaptureReport, capture
from kdfast.cache.errors import CacheMismatchError
from kdfast.cache.format.keys import describe, replica_key
from kdfast.cache.format.view import View
from kdfast.cache.read.reader import CacheReader
from kdfast.models import device_of, logits_of, move

__all__ = ["ViewedExamples", "capture_views", "crop_and_flip", "noise_tokens", "random_view", "view_span"]

# An augmented sample, which depends on the sample and the view alone.
Augment = Callable[[Any, View], Tensor]


# ---- augmentations --------------------------------------------------------------------------------------------------


def random_view(key: Any, number: int, *, smallest: float = 0.5, flip: bool = True) -> View:
    """Draw a view of a sample: a crop, a flip and a seed, which depend on ``key`` and ``number`` alone.

    Args:
        key: the sample's key in the cache: a name, or ids.
        number: which of the sample's views, such as the number of the epoch, in 0 ... 2**32 - 1.
        smallest: the crop's smallest height and width, as a share of the image's; both are drawn between it and 1.
        flip: whether half of the views are mirrored.

    Raises:
        ValueError: ``smallest`` is not in (0, 1].
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must lie in (0, 1], got {smallest}")
    seed = int.from_bytes(replica_key(key, number)[:4], "little")
    u = _uniform(seed, 5)
    height, width = smallest + (1 - smallest) * u[:2]
    crop = float(u[2] * (1 - height)), float(u[3] * (1 - width)), float(height), float(width)
    return View(crop, flip and bool(u[4] < 0.5), seed)


def crop_and_flip(image: Tensor, view: View, *, size: tuple[int, int], noise: float = 0.0) -> Tensor:
    """Augment an image: the view's crop, mirrored if the view is flipped, scaled to ``size``, plus noise.

    Args:
        image: (C, H, W) floating point.
        view: its crop is rounded to whole pixels, at least one; its seed determines the noise.
        size: (height, width) of the result.
        noise: standard deviation of uniform noise that is added to every value.

    Returns:
        (C, *size).

    Raises:
        TypeError: ``image`` is not floating point, or not of three dimensions.
    """
    if not image.is_floating_point() or image.dim() != 3:
        raise TypeError(f"image must be (C, H, W) in floating point, got {image.dtype} {tuple(image.shape)}")
    if view.crop is not None:
        (top, bottom), (left, right) = (
            _pixels(view.crop[axis], view.crop[axis + 2], image.shape[axis + 1]) for axis in (0, 1)
        )
        image = image[:, top:bottom, left:right]
    if view.flip:
        image = image.flip(-1)
    image = nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    if not noise:
        return image
    u = torch.from_numpy(_uniform(view.seed, image.numel())).to(image).view_as(image)
    return image + noise * 12**0.5 * (u - 0.5)


def noise_tokens(
    ids: Tensor, view: View, *, rate: float = 0.1, token: int | None = None, vocab_size: int | None = None
) -> Tensor:
    """Augment token ids: replace each with probability ``rate``, by ``token`` (word dropout) or by a random id.

    The length stays the same, so that each row of the labels has its position.

    Args:
        ids: (length,) integers.
        view: its seed determines the noise; its crop and flip are ignored.
        rate: in [0, 1].
        token: the id that replaces others.
        vocab_size: in place of ``token``, how many ids the random one is drawn from.

    Returns:
        (length,) ids.

    Raises:
        TypeError: ``ids`` are not integers of one dimension.
        ValueError: ``rate`` is not in [0, 1], or not exactly one of ``token`` and ``vocab_size`` is given.
    """
    if ids.is_floating_point() or ids.dim() != 1:
        raise TypeError(f"ids must be integers of (length,), got {ids.dtype} {tuple(ids.shape)}")
    if not 0 <= rate <= 1 or (token is None) == (vocab_size is None):
        raise ValueError(
            f"rate must lie in [0, 1], and one of token and vocab_size be given, got rate {rate}, token {token} and "
            f"vocab_size {vocab_size}"
        )
    u = torch.from_numpy(_uniform(view.seed, 2 * len(ids))).to(ids.device)
    chosen, which = u[: len(ids)] < rate, u[len(ids) :]
    other = ids.new_tensor(token) if vocab_size is None else (which * vocab_size).to(ids.dtype)
    return torch.where(chosen, other, ids)


def _uniform(seed: int, count: int) -> NDArray[Any]:
    """Random numbers in [0, 1) that stay the same in every version: NumPy keeps its bit generators' streams."""
    return (np.random.PCG64(seed).random_raw(count) >> np.uint64(11)) * 2.0**-53


def _pixels(start: float, share: float, size: int) -> tuple[int, int]:
    first = min(round(start * size), size - 1)
    return first, min(first + max(round(share * size), 1), size)


# ---- their labels ---------------------------------------------------------------------------------------------------


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
    """Write a cache of a teacher's labels for several views of each sample: a record per sample, a row per view.

    Args:
        model: the teacher, called with a batch of augmented samples.
        keys: the samples' keys in the cache: a name, or ids, for each.
        samples: images, token ids, or whatever ``augment`` takes.
        path: the cache's directory.
        augment: a function from a sample and a view to a tensor, which depends on nothing else.
        vocab_size: columns of the logits.
        views: how many each sample has.
        draw: a function from a key and a number in 0 ... views - 1 to a view, always the same one.
        batch_size: samples per batch; the teacher sees ``views`` times as many at once.
        options: those of ``kdfast.cache.capture`` and of the codec.

    Returns:
        The report of ``kdfast.cache.capture``.

    Raises:
        ValueError: keys and samples differ in number, or ``views`` is less than 1.
        CacheError: ``kdfast.cache.capture`` says why.
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
    """The examples of a ``CacheDataset``: every sample under every view that the cache has labels of.

    Args:
        cache: a cache that ``capture_views`` has written.
        keys, samples, augment: the arguments of ``capture_views``.
        labels: one per sample, if there are any: an example is then (augmented sample, label).

    Attributes:
        keys: the place of each example's labels in the cache: (key, number of the view, 1).
        views: the views of each sample.

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
    """The place of a view's labels in the cache: ``cache.gather([view_span(cache, key, view)])``.

    For a student's loader that draws views itself, with the ``draw`` of ``capture_views``.

    Args:
        cache: a cache that ``capture_views`` has written.
        key: of the sample.
        view: of the sample.

    Returns:
        (key, number of the view, 1).

    Raises:
        CacheMismatchError: the cache has no labels of this view; the message names key and view.
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
