"""What a caller hands to a writer, checked, in the writer's own memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import Codec
from kdfast.cache.format.view import View, pack_views
from kdfast.labels import SoftLabels

__all__ = ["check_labels", "check_logits", "check_views", "select"]


def check_logits(logits: Tensor, codec: Codec, width: int) -> Tensor:
    """The first columns of (rows, width) ``logits``, as many as ``codec`` takes; every row fit to be selected from."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{codec.input_name} must be a floating-point tensor, got {got}")
    rows = logits[None] if logits.dim() == 1 else logits
    if rows.dim() != 2 or rows.shape[1] != width:
        wanted = f"(rows, {width}) or ({width},)"
        raise ValueError(f"{codec.input_name} must be {wanted}, got {tuple(logits.shape)}")
    rows = rows.detach()[:, : codec.input_width]
    # The maximum is NaN or +inf if any column is, and -inf if no column is finite.
    largest = rows.amax(1)
    for row in (~largest.isfinite()).nonzero().flatten().tolist()[:1]:
        value = float(largest[row])
        problem = "no finite value" if value == -torch.inf else f"a value of {value}"
        raise ValueError(f"row {row} has {problem}")
    return rows


def select(codec: Codec, logits: Tensor, key: bytes) -> SoftLabels:
    """What ``codec`` keeps, on the CPU, sharing no memory with ``logits``: a teacher may reuse theirs."""
    labels = codec.select(logits, key).to("cpu")
    if labels.values.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr():
        return _copy(labels)
    return labels


def check_labels(labels: SoftLabels, codec: Codec) -> SoftLabels:
    """A copy of ``labels``, found to be such as ``codec`` selects."""
    if not isinstance(labels, SoftLabels):
        raise TypeError(f"labels must be SoftLabels, got {type(labels).__name__}")
    for name in ("kind", "vocab_size", "temperatures"):
        ours, theirs = getattr(codec.empty, name), getattr(labels, name)
        if ours != theirs:
            raise ValueError(f"codec {codec.name!r} stores labels of {name} {ours!r}, got {theirs!r}")
    if labels.present is not None and not bool(labels.present.all()):
        raise ValueError("labels must have all rows present: a cache holds no absent ones")
    copy = _copy(labels.to("cpu"))
    if len(copy):
        codec.check(copy)  # here it can be refused by name, in the background it would stop everything
    return copy


def check_views(views: Sequence[View], rows: int) -> NDArray[np.uint8]:
    """(rows, 13): ``views`` as a shard stores them."""
    views = list(views)
    for view in views:
        if not isinstance(view, View):
            raise TypeError(f"views must be kdfast.cache.View, got {type(view).__name__}")
    if len(views) != rows:
        raise ValueError(f"views must be one per row, {rows}, got {len(views)}")
    return pack_views(views)


def _copy(labels: SoftLabels) -> SoftLabels:
    return labels.map_tensors(lambda part: part.detach().clone())
