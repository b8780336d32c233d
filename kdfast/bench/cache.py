"""Bytes of stored labels against how far they are from the teacher: ours through files, rivals by their layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

import kdfast.cache
from kdfast.bench.cache_speed import Speed, speed
from kdfast.bench.layouts import LAYOUTS, Label, bytes_per_token
from kdfast.bench.quality import Source, distributions, quality
from kdfast.bench.teacher import Corpus
from kdfast.cache import codecs
from kdfast.cache.codecs.base import Codec
from kdfast.cache.selection.prototypes import PrototypeTable
from kdfast.cache.tools.stats import cache_stats

__all__ = ["ARMS", "CodecConfig", "Row", "measure_ours", "measure_rivals", "sampled_rows"]

DRAWS = 8  # that noise is told from bias by
SYMBOLS = {"draws": "N", "tau": "τ", "k": "k"}
SPEED_WINDOWS = 32  # decoded at once for the rate


@dataclass(frozen=True)
class CodecConfig:
    """One way to write a cache.

    Args:
        codec: the codec's name.
        options: its options, of which the arms of one series differ in the first.
        tail: the resolution of what is not among the likeliest columns, for the table.
        prototypes: how many the table has that the codec chooses from, or orders ids by; 0: there is none.
    """

    codec: str
    options: Mapping[str, Any]
    tail: str
    prototypes: int = 0

    @property
    def parameter(self) -> str:
        """The value of the option that the arms of one series differ in."""
        return f"{self._first[1]:g}".removeprefix("0") or "0"

    @property
    def label(self) -> str:
        """The parameter with its symbol, for a picture."""
        return f"{SYMBOLS[self._first[0]]} = {self.parameter}"

    @property
    def _first(self) -> tuple[str, Any]:
        return next(iter(self.options.items()))

    @property
    def series(self) -> str:
        prototypes = f", {self.prototypes} prototypes" if self.prototypes else ""
        return f"{self.codec}{prototypes}{', rows' if self.options.get('coding') == 'rows' else ''}"

    @property
    def name(self) -> str:
        return self.series.replace(self.codec, f"{self.codec}-{self.parameter}", 1)

    @property
    def drawn(self) -> bool:
        return codecs.find(self.codec).drawn


def _arms() -> list[CodecConfig]:
    def sample(draws: int, prototypes: int = 0, **options: Any) -> CodecConfig:
        return CodecConfig("sample", {"draws": draws, **options}, f"1/{draws}", prototypes)

    def prototype(k: int, prototypes: int = 256, **options: Any) -> CodecConfig:
        return CodecConfig("prototype", {"k": k, **options}, f"{prototypes} prototypes", prototypes)

    draws = [sample(n) for n in (50, 23, 10)]
    draws += [CodecConfig("threshold", {"tau": tau}, f"{tau:g}") for tau in (0.1, 0.05, 0.02)]
    return [
        *draws,
        sample(23, coding="rows"),
        CodecConfig("topk", {"k": 16}, "its mass"),
        *(replace(arm, prototypes=256) for arm in draws),
        sample(23, 256, coding="rows"),
        *(prototype(k) for k in (0, 1, 3, 9)),
        prototype(1, coding="rows"),
        sample(50, 1024),
        prototype(1, 1024),
    ]


ARMS = {arm.name: arm for arm in _arms()}


@dataclass(frozen=True)
class Row:
    """One way to store labels. Bytes are per token; ``fixed_bytes`` are per cache, however many tokens it has."""

    name: str
    series: str
    entries: float
    payload_bytes: float
    noise: float  # see Quality
    bias: float
    bias_error: float
    missed: float
    kl: float | None
    kl_of: str  # "the label"; "tail spread evenly"; "draws", which have none
    tail: str
    ours: bool = False
    file_bytes: float | None = None  # of all files but the fixed ones; rivals' are not known
    fixed_bytes: int | None = None  # codec models and tables of prototypes
    speed: Speed | None = None


# ---- ours -----------------------------------------------------------------------------------------------------------


def measure_ours(
    corpus: Corpus,
    tables: Mapping[int, PrototypeTable],
    arms: Iterable[CodecConfig],
    folder: Path,
    *,
    sampled: Tensor,
    repeats: int = 5,
    advance: Callable[[str], None] = lambda doing: None,
) -> list[Row]:
    """Write a cache of all of ``corpus`` per arm into ``folder``, read it back, and compare.

    Args:
        tables: by the arms' ``prototypes``.
        sampled: positions that are compared with the teacher, counted over all windows.
        repeats: of each timing.
        advance: called with what has just been done.
    """
    logits, rows = corpus.logits_of(sampled), []
    for count in (0, *tables):  # an arm holds its table's ranks in memory: not all tables at once
        group = [arm for arm in arms if arm.prototypes == count]
        _write(corpus, tables.get(count), group, folder, advance)
        for arm in group:
            rows.append(_measure(corpus, arm, folder / arm.name, sampled, logits, repeats))
            advance(arm.name)
    return rows


def sampled_rows(corpus: Corpus, count: int) -> Tensor:
    """``count`` positions spread evenly over all windows of ``corpus``, or all positions."""
    total = corpus.ids.numel()
    return torch.arange(0, total, max(1, total // count))[:count]


def _write(
    corpus: Corpus,
    prototypes: PrototypeTable | None,
    arms: list[CodecConfig],
    folder: Path,
    advance: Callable[[str], None],
) -> None:
    """Write the caches of ``arms`` in one pass over the teacher."""
    extra: dict[str, Any] = {} if prototypes is None else {"prototypes": prototypes}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                kdfast.cache.Writer(
                    folder / arm.name, vocab_size=corpus.vocab_size, codec=arm.codec, **arm.options, **extra
                )
            )
            for arm in arms
        ]
        for window in range(len(corpus) if arms else 0):
            logits = corpus.logits(slice(window, window + 1))
            for writer in writers:
                writer.add(window, logits)
            advance("writing")


def _measure(corpus: Corpus, arm: CodecConfig, path: Path, sampled: Tensor, logits: Tensor, repeats: int) -> Row:
    cache = kdfast.cache.open(path)
    first = cache.pack(range(min(len(corpus), SPEED_WINDOWS)))
    # Before the caches are counted, so that no reading of all of them has filled the processor's caches with theirs.
    timed = speed(first.codec, corpus.logits(slice(0, 1)), first, repeats)
    length = corpus.ids.shape[1]
    stored = cache.gather([(int(at) // length, int(at) % length, 1) for at in sampled])
    source = _source(stored, logits, first.codec)
    found = quality(logits, source, DRAWS if arm.drawn else 1)
    stats = cache_stats(path)
    tokens, used = stats.rows, stats.bytes
    fixed = used.model + used.assets
    return Row(
        name=arm.name,
        series=arm.series,
        entries=stats.entries_per_row,
        payload_bytes=used.payload / tokens,
        **vars(replace(found, kl=None) if arm.drawn else found),
        kl_of={"weights": "draws", "topk": "tail spread evenly", "prototype": "the label"}[stored.kind],
        tail=arm.tail,
        ours=True,
        file_bytes=(used.files - fixed) / tokens,
        fixed_bytes=fixed,
        speed=timed,
    )


def _source(stored: kdfast.SoftLabels, logits: Tensor, codec: Codec) -> Source:
    def labels(rows: slice, draw: int) -> Tensor:
        if draw:
            key = (draw << 32 | rows.start).to_bytes(16, "little")
            return distributions(codec.select(logits[rows], key))
        return distributions(stored[rows])

    return labels


# ---- rivals ---------------------------------------------------------------------------------------------------------


def measure_rivals(corpus: Corpus, sampled: Tensor, advance: Callable[[str], None] = lambda doing: None) -> list[Row]:
    """Measure every layout of ``layouts.LAYOUTS``, with its published number of entries, at positions ``sampled``."""
    logits, rows = corpus.logits_of(sampled), []
    for name in LAYOUTS:
        rows.append(_rival(name, logits))
        advance(name)
    return rows


def _rival(name: str, logits: Tensor) -> Row:
    layout, (count, vocab_size) = LAYOUTS[name], logits.shape
    drawn = name in ("rskd", "sampledkd")

    def made(rows: slice, draw: int) -> Iterator[Label]:
        # One after another: small tensors kept between large ones would cut up the memory.
        for row in range(rows.start, rows.stop):
            yield layout.label(logits[row].double().softmax(0), layout.entries, _seeded(row, draw))

    def labels(rows: slice, draw: int) -> Tensor:
        return torch.stack([replace(label, spread=True).dense(vocab_size) for label in made(rows, draw)])

    entries = sum(len(label.ids) for label in made(slice(0, count), 0)) / count
    found = quality(logits, labels, DRAWS if drawn else 1)
    tail, kl_of = _tail(name, next(made(slice(0, 1), 0)))
    return Row(
        name=name,
        series="rivals",
        entries=entries,
        payload_bytes=bytes_per_token(name, vocab_size, entries if name == "rskd" else None),
        **vars(found),
        kl_of=kl_of,
        tail=tail,
    )


def _tail(name: str, label: Label) -> tuple[str, str]:
    """The resolution of the tail, and what the KL is of."""
    if name == "rskd":
        return f"1/{LAYOUTS[name].entries}", "draws"
    if label.spread:
        return "its mass", "the label"
    return ("its mass" if label.rest else "cut"), "tail spread evenly"


def _seeded(row: int, draw: int) -> Generator:
    # A generator of PyTorch's heeds 32 bits of its seed, and neighbouring seeds may start alike.
    return torch.Generator().manual_seed(int(np.random.SeedSequence([draw, row]).generate_state(1)[0]))
