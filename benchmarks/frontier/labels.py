"""Each arm's labels of the training windows, through its codec's bytes, kept on disk between runs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from arms import ARMS, LabelSource
from residual import Residual, residual_of
from teacher import LENGTH, TRAIN_WINDOWS, Corpus
from torch import Tensor

from kdfast import SoftLabels
from kdfast.bench.teacher import load_prototypes
from kdfast.cache import codecs
from kdfast.cache.codecs.base import Codec

__all__ = ["Labels", "make_labels"]

BLOCK_WINDOWS = 8  # 2048 rows to a block


class Labels:
    """The labels of every training window for one arm, and their size."""

    def __init__(self, windows: list[SoftLabels], payload: float, model: int, residual: list[Residual]) -> None:
        self.windows, self.residual = windows, residual
        rows = sum(map(len, windows))
        entries = sum(labels.values.numel() for labels in (*windows, *(part.draws for part in residual)))
        self.bytes_per_token, self.entries_per_token = payload / rows, entries / rows
        self.model_bytes = model

    def at(self, windows: list[int]) -> SoftLabels | tuple[SoftLabels, Residual]:
        labels = SoftLabels.cat([self.windows[i] for i in windows])
        return (labels, Residual.cat([self.residual[i] for i in windows])) if self.residual else labels


def make_labels(corpus: Corpus, folder: Path, name: str, draw: int, windows: int = TRAIN_WINDOWS) -> Labels:
    """The labels of the arm ``name``, from ``folder`` or made and written there; ``draw`` seeds random ones.

    Args:
        windows: how many get labels, from the first one on.
    """
    arm = ARMS[name]
    assert arm.codec is not None
    drawn = codecs.find(arm.codec).drawn or arm.residual
    which = f"{zlib.crc32(repr(arm).encode()):08x}"  # an arm of other options has other labels
    path = folder / f"labels-{name}-{draw if drawn else 'all'}-{which}.pt"
    if not path.exists():
        labels = _labels(corpus, folder, arm, draw, windows)
        part = path.with_suffix(f".{os.getpid()}.part")
        torch.save(labels, part)
        part.rename(path)
    made: Labels = torch.load(path, weights_only=False)
    return made


def _labels(corpus: Corpus, folder: Path, arm: LabelSource, draw: int, count: int) -> Labels:
    assert arm.codec is not None
    options = dict(arm.options)
    if codecs.find(arm.codec).drawn:
        options["seed"] = draw
    if arm.codec == "sample":  # arms that do not say so were trained before there was a choice
        options.setdefault("sampling", "independent")
    if arm.prototypes:
        options["prototypes"] = load_prototypes(corpus, folder, arm.prototypes, options["k"])
    stored = Stored(codecs.create(arm.codec, corpus.vocab_size, (1.0,), options), corpus.logits, count)
    windows, payload, model, residual = stored.windows, float(stored.payload), stored.model, []
    if arm.residual:
        draws = {"draws": arm.residual, "seed": draw, "prototypes": options["prototypes"]}
        draws["sampling"] = "independent"
        codec = codecs.create("sample", corpus.vocab_size, (1.0,), draws)
        residual, drawn = _residual(corpus, codec, windows)
        payload += drawn.payload + sum(part.extra_bytes for part in residual)
        model += drawn.model
    if arm.renormalise:
        windows = [_without_tail(labels) for labels in windows]
    return Labels(windows, payload, model, residual)


class Stored:
    """Each training window's labels, encoded and decoded block by block: a student sees what a cache would give it."""

    def __init__(self, codec: Codec, logits: Callable[[slice], Tensor], count: int) -> None:
        selected = [codec.select(logits(slice(i, i + 1)), i.to_bytes(16, "little")) for i in range(count)]
        if codec.learn_rows:
            codec.use_model(codec.learn(SoftLabels.cat(selected)[: codec.learn_rows]))
        self.windows: list[SoftLabels] = []
        self.payload, self.model = 0, len(codec.model)
        for i in range(0, len(selected), BLOCK_WINDOWS):
            part = selected[i : i + BLOCK_WINDOWS]
            data = np.frombuffer(codec.encode(SoftLabels.cat(part)), np.uint8)
            self.payload += len(data)
            rows = len(part) * LENGTH
            labels = codec.decode(data, np.array([[0, len(data), rows]]), np.arange(rows))
            self.windows += [labels[j * LENGTH : (j + 1) * LENGTH] for j in range(len(part))]


def _residual(corpus: Corpus, codec: Codec, windows: list[SoftLabels]) -> tuple[list[Residual], Stored]:
    def missed(window: int) -> Tensor:
        return residual_of(corpus.logits(slice(window, window + 1)).softmax(1), windows[window])

    drawn = Stored(codec, lambda part: missed(part.start).abs().log(), len(windows))
    parts = []
    for window, draws in enumerate(drawn.windows):
        assert draws.ids is not None
        assert draws.offsets is not None
        residual = missed(window)
        signs = residual[torch.repeat_interleave(draws.offsets.diff()), draws.ids.long()].sign()
        parts.append(Residual(draws, signs, residual.abs().sum(1).half().float()))
    return parts, drawn


def _without_tail(labels: SoftLabels) -> SoftLabels:
    """Top-k labels as most other systems use them: entries scaled up to a mass of 1, without a tail."""
    assert labels.ids is not None
    probs = labels.values.exp().view(len(labels), -1)
    ids = labels.ids.view(len(labels), -1)
    return SoftLabels.weights(ids, probs / probs.sum(1, keepdim=True), vocab_size=labels.vocab_size)
