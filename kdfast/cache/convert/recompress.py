"""One cache into another codec or other options, where nothing is lost but what these declare."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from kdfast.cache.convert.report import BiasReport
from kdfast.cache.errors import CacheError
from kdfast.cache.format.keys import Key
from kdfast.cache.read.reader import CacheInfo, open_cache
from kdfast.cache.read.walk import walk
from kdfast.cache.write.writer import Writer
from kdfast.labels import Dense, SoftLabels, TopK
from kdfast.labels.entries import offsets_of

__all__ = ["recompress"]

TOPK_DEFAULT = 16  # the codec's own


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
        options = {**about.config, **options}
    portions = walk(source, cache)
    first = next(portions, None)
    if first is not None:
        _check(source, first.labels, about, codec, kept, options)
    report = BiasReport(f"the {about.codec} cache {source}", heads=codec == "topk")
    stored = {"codec": codec, "temperatures": kept, "teacher": about.teacher, "keys": about.keys, **options}
    with Writer(destination, vocab_size=about.vocab_size, **stored) as writer:
        for portion in chain([] if first is None else [first], portions):
            for key, labels in portion.records():
                _store(writer, key, labels, kept, options, report)
                if progress is not None:
                    progress()
    return report


def _check(
    source: str | os.PathLike[str],
    labels: SoftLabels,
    about: CacheInfo,
    codec: str,
    kept: tuple[float, ...],
    options: Mapping[str, Any],
) -> None:
    """Raise ``CacheError`` for what the source does not say."""
    if isinstance(labels, Dense):
        return
    if not isinstance(labels, TopK) or codec != "topk":
        raise CacheError(
            f"{source}: holds {labels.kind} labels ({about.codec}), which a {codec} cache cannot be made from: "
            f"only dense labels tell everything, and topk ones what another topk cache needs. Run the teacher again"
        )
    missing = [t for t in kept if t not in about.temperatures]
    if missing:
        raise CacheError(f"{source}: holds tails for temperatures {about.temperatures}, not for {missing}")
    if options["k"] > about.config["k"]:
        raise CacheError(f"{source}: holds at most {about.config['k']} entries per row, k={options['k']} are wanted")


def _store(
    writer: Writer,
    key: Key | int,
    labels: SoftLabels,
    kept: tuple[float, ...],
    options: Mapping[str, Any],
    report: BiasReport,
) -> None:
    if key in writer:
        report.duplicates += 1
    elif isinstance(labels, Dense):
        writer.add(key, labels.values)
        k = min(options.get("k", TOPK_DEFAULT), labels.vocab_size) if report.heads else labels.vocab_size
        report.count(labels.values.double().exp().topk(k, 1).values.sum(1).numpy(), k * len(labels))
    else:
        assert isinstance(labels, TopK)  # as _check has found
        smaller = _narrow(labels, kept, options["k"])
        writer.add_labels(key, smaller)
        weights, _ = smaller.at(kept[0])
        mass = torch.zeros(len(smaller), dtype=torch.float64).index_add(0, smaller.entry_rows, weights.double())
        report.count(mass.numpy(), len(weights))


def _narrow(labels: TopK, kept: tuple[float, ...], k: int) -> TopK:
    """The first ``k`` entries of each row, which are its largest, and the tails at ``kept`` with what is dropped."""
    row = labels.entry_rows
    rest = torch.arange(len(row)) - labels.offsets[row] >= k
    tails = labels.tails[[labels.temperatures.index(t) for t in kept]].double()
    for tail, temperature in zip(tails, kept, strict=True):
        weights = labels.at(temperature)[0].double()
        dropped = torch.zeros_like(tail).index_add(0, row[rest], weights[rest])
        torch.logaddexp(tail, dropped.log(), out=tail)
    return replace(
        labels,
        ids=labels.ids[~rest],
        values=labels.values[~rest],
        tails=tails.float(),
        temperatures=kept,
        offsets=offsets_of(labels.counts.clamp(max=k)),
        width=None,
    )
