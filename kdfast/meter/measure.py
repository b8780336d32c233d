"""Runs models over documents that a cache or a base file has the teacher's side of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast.cache import CacheReader
from kdfast.meter.base_file import BaseFile
from kdfast.meter.estimate import Measurement, Rows, difference, row_terms
from kdfast.meter.models import Loader
from kdfast.models import call, device_of, evaluating, logits_of

__all__ = ["Comparison", "compare", "measure"]

BATCH = 8  # documents
Documents = Sequence[Tensor | Sequence[int]]


class Comparison(NamedTuple):
    """Models in the order of their KL, nearest first, each with what sets it apart from the one before it."""

    measurements: list[Measurement]
    steps: list[tuple[float, float] | None]  # mean difference from the one before, and its standard error


def measure(
    teacher: CacheReader | BaseFile,
    model: Any,
    documents: Documents | None = None,
    *,
    name: str = "model",
    batch_size: int = BATCH,
    progress: Callable[[], object] | None = None,
) -> Measurement:
    """Measure KL(teacher || model) over documents.

    Args:
        teacher: a cache of codec ``scored``, or llama.cpp's base file, which holds whole distributions.
        model: a module or function from (batch, length) ids to logits, Hugging Face's output or a tensor.
        documents: the token ids of the cache's records (``kdfast.cache.windows``); a base file brings its own.
        name: of the model, in what is returned.
        batch_size: documents of the same length at a time.
        progress: called after each document.

    Raises:
        ValueError: no documents, documents beside a base file, or a model with other rows or columns than the teacher.
        KeyError: a document is not in the cache.
    """
    return _rows(teacher, model, documents, batch_size, progress).measurement(name, *_about(teacher, documents))


def compare(
    teacher: CacheReader | BaseFile,
    models: Mapping[str, Any],
    documents: Documents | None = None,
    *,
    batch_size: int = BATCH,
    progress: Callable[[], object] | None = None,
) -> Comparison:
    """Rank several models by their KL from the teacher, with errors of the differences, which are paired row by row.

    Args:
        teacher: a cache of codec ``scored``, or llama.cpp's base file.
        models: the models by name, each as ``measure`` takes it, or a ``kdfast.meter.Loader`` that loads one, so that
            one at a time is in memory.
        documents: the token ids of the cache's records; a base file brings its own.
        batch_size: documents of the same length at a time.
        progress: called after each document of each model.

    Raises:
        ValueError: no documents, documents beside a base file, or a model with other rows or columns than the teacher.
        KeyError: a document is not in the cache.
    """
    rows = {name: _rows(teacher, model, documents, batch_size, progress) for name, model in models.items()}
    about = _about(teacher, documents)
    ranked = sorted((found.measurement(name, *about) for name, found in rows.items()), key=lambda m: m.kl)
    pairs = itertools.pairwise(ranked)
    steps = [None, *(difference(rows[after.name], rows[before.name]) for before, after in pairs)]
    return Comparison(ranked, steps[: len(ranked)])


def _about(teacher: CacheReader | BaseFile, documents: Documents | None) -> tuple[float | None, bool]:
    """The teacher's cross-entropy on the documents' next tokens, if it is known, and whether the KL is exact."""
    if isinstance(teacher, BaseFile):
        return teacher.cross_entropy, True
    whole = documents is not None and len(documents) == len(teacher)
    return teacher.info.cross_entropy if whole else None, False


def _rows(
    teacher: CacheReader | BaseFile,
    model: Any,
    documents: Documents | None,
    batch_size: int,
    progress: Callable[[], object] | None,
) -> Rows:
    model = model() if isinstance(model, Loader) else model
    if isinstance(teacher, BaseFile):
        if documents is not None:
            raise ValueError("a base file has documents of its own: give it none")
        return teacher.rows(model, progress)
    if documents is None or not len(documents):
        raise ValueError("a cache is measured on documents, its records' token ids: give kdfast.cache.windows(...)")
    parts, done = [], 0
    ids = [torch.as_tensor(document, dtype=torch.int64).reshape(-1) for document in documents]
    with evaluating(model), torch.no_grad():
        for _, run in itertools.groupby(ids, key=len):  # neighbours of one length
            for batch in _batches(run, batch_size):
                parts.append(_batch(teacher, model, batch, done))
                done += len(batch)
                for _ in batch if progress is not None else ():
                    progress()  # type: ignore[misc]
    return Rows.cat(parts)


def _batches(ids: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    ids = iter(ids)
    while batch := list(itertools.islice(ids, size)):
        yield batch


def _batch(cache: CacheReader, model: Any, ids: list[Tensor], first: int) -> Rows:
    """The rows of documents of one length, the first of which has the number ``first``."""
    stacked = torch.stack(ids)
    device = device_of(model) or stacked.device
    logits = logits_of(call(model, stacked.to(device)), "the model")
    labels = cache.gather(ids).to(logits.device)
    if logits.dim() != 3 or logits.shape[:2] != stacked.shape or len(labels) != stacked.numel():
        raise ValueError(
            f"documents of {tuple(stacked.shape)} ids have {len(labels)} rows in the cache, and the model gave logits "
            f"{tuple(logits.shape)}: a row per token is measured, so capture without a mask"
        )
    kl, agree = row_terms(logits.reshape(-1, logits.shape[-1]), labels)
    ce = torch.full(stacked.shape, torch.nan, dtype=torch.float64)
    if stacked.shape[1] > 1:
        lost = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), stacked[:, 1:].to(logits.device), reduction="none"
        )
        ce[:, :-1] = lost.double().cpu()
    document = np.repeat(np.arange(first, first + len(ids)), stacked.shape[1])
    return Rows(kl.cpu().numpy(), agree.cpu().numpy(), document, ce.reshape(-1).numpy())
