"""Augmentations that a view decides: whoever has the sample and the view has the same pixels, or the same ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdfast.cache.format.keys import replica_key
from kdfast.cache.format.view import View

__all__ = ["crop_and_flip", "noise_tokens", "random_view"]


def random_view(key: Any, number: int, *, smallest: float = 0.5, flip: bool = True) -> View:
    """View ``number`` of a sample, a function of ``key`` and ``number`` alone: an epoch's number will do.

    Args:
        key: as the cache takes it: a name, or ids.
        number: 0 ... 2**32 - 1.
        smallest: of the crop's height and width, as a share of the image's; each is drawn between that and 1.
        flip: mirror every other view.

    Raises:
        ValueError: ``smallest`` outside (0, 1].
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must lie in (0, 1], got {smallest}")
    seed = int.from_bytes(replica_key(key, number)[:4], "little")
    u = _uniform(seed, 5)
    height, width = smallest + (1 - smallest) * u[:2]
    crop = float(u[2] * (1 - height)), float(u[3] * (1 - width)), float(height), float(width)
    return View(crop, flip and bool(u[4] < 0.5), seed)


def crop_and_flip(image: Tensor, view: View, *, size: tuple[int, int], noise: float = 0.0) -> Tensor:
    """The view's part of an image, scaled to ``size``, mirrored where the view says so.

    Args:
        image: (C, H, W) floating point.
        view: its crop is rounded to whole pixels, at least one; its seed draws the noise.
        size: (height, width) of the result.
        noise: standard deviation of what is added to every value.

    Raises:
        TypeError, ValueError: no such image.
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
    """Each id with probability ``rate`` replaced: by ``token`` (word dropout), or by any of ``vocab_size`` ids.

    The length stays, so that rows remain rows. Only the view's seed matters.

    Args:
        ids: (length,) integers.
        rate: in [0, 1].
        token, vocab_size: one of them: the mask's id, or how many ids there are.

    Raises:
        TypeError, ValueError: no such ids or rate, or not exactly one of ``token`` and ``vocab_size``.
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
    """Numbers in [0, 1) that no version of any library changes: NumPy keeps its bit generators' streams."""
    return (np.random.PCG64(seed).random_raw(count) >> np.uint64(11)) * 2.0**-53


def _pixels(start: float, share: float, size: int) -> tuple[int, int]:
    first = min(round(start * size), size - 1)
    return first, min(first + max(round(share * size), 1), size)
