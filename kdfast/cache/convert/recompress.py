"""Storing a cache in another codec or with other options, where nothing is lost but what these declare."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kdfast.cache import codecs
from kdfast.cache.convert.report import BiasReport
from kdfast.cache.errors import CacheError
from kdfast.cache.format.keys import Key
from kdfast.cache.read.reader import CacheReader, open_cache
from kdfast.cache.read.walk import walk
from kdfast.cache.write.writer import Writer
from kdfast.labels import Dense, Ragged, SoftLabels

__all__ = ["recompress"]


def recompress(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    codec: str,
    temperatures: Sequence[float] | None = None,
    progress: Callable[[], None] | None = None,
    **options: Any,
) -> BiasReport:
    """Store the records of the cache ``source`` again, under the same keys and teacher.

    Dense labels are a whole distribution: any codec may select from them. Top-k labels may be coded otherwise, or keep
    fewer entries and temperatures, what is dropped joining each tail. Nothing else can be had without inventing it.
    Records that the destination holds already are skipped, so that a run that was cut short can be run again.

    Args:
        source, destination: directories.
        codec: the new codec's name.
        temperatures: default: those of the source.
        progress: called after each record.
        options: of the codec or the ``Writer``.

    Raises:
        CacheError: what is asked for is not in the source: another kind of labels, more entries, other temperatures.
        CacheMismatchError: the destination holds a cache of another kind.
    """
    cache = open_cache(source)
    about = cache.info
    kept = about.temperatures if temperatures is None else tuple(float(t) for t in temperatures)
    if codec == about.codec:  # what is not asked for stays as it is
        options = {**cache.codec.keywords(), **options}
    narrow = None if isinstance(cache.codec.empty, Dense) else _narrowing(source, cache, codec, kept, options)
    report = BiasReport(f"the {about.codec} cache {source}")
    stored = {"codec": codec, "temperatures": kept, "teacher": about.teacher, "keys": about.keys, **options}
    with Writer(destination, vocab_size=about.vocab_size, **stored) as writer:
        report.heads = writer.codec.heads is not None
        for batch in walk(source, cache):
            for key, labels in batch.records():
                _store(writer, key, labels, narrow, report)
                if progress is not None:
                    progress()
    return report


def _narrowing(
    source: str | os.PathLike[str],
    cache: CacheReader,
    codec: str,
    temperatures: tuple[float, ...],
    options: Mapping[str, Any],
) -> Callable[[SoftLabels], Ragged]:
    """The function that makes the new codec's labels of stored ones. Raises ``CacheError`` if they hold too little."""
    target = codecs.find(codec)
    try:
        return target.narrowing(cache.codec, temperatures, options)
    except ValueError as error:
        raise CacheError(f"{source}: {error}") from error


def _store(
    writer: Writer,
    key: Key | int,
    labels: SoftLabels,
    narrow: Callable[[SoftLabels], Ragged] | None,
    report: BiasReport,
) -> None:
    if key in writer:
        report.duplicates += 1
        return
    if narrow is None:
        writer.add(key, labels.values)
        k = writer.codec.heads or labels.vocab_size
        report.count(labels.values.double().exp().topk(k, 1).values.sum(1).numpy(), k * len(labels))
        return
    smaller = narrow(labels)
    writer.add_labels(key, smaller)
    weights, _ = smaller.at(smaller.temperatures[0])
    mass = torch.zeros(len(smaller), dtype=torch.float64).index_add(0, smaller.entry_rows, weights.double())
    report.count(mass.numpy(), len(weights))
