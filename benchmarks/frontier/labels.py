"""Each arm's labels of the training windows, through its codec's bytes, kept on disk between runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from arms import ARMS, Arm
from teacher import LENGTH, Corpus

from kdfast import SoftLabels
from kdfast.bench.teacher import LEARN_WINDOWS, load_shapes
from kdfast.cache import codecs
from kdfast.cache.codecs.base import Codec

__all__ = ["Labels", "make_labels"]

BLOCK_WINDOWS = 8  # 2048 rows to a block
TRAIN_WINDOWS = LEARN_WINDOWS


class Labels:
    """One arm's labels of every training window, and what they take."""

    def __init__(self, windows: list[SoftLabels], payload: int, model: int, entries: int) -> None:
        self.windows = windows
        rows = sum(map(len, windows))
        self.bytes_per_token, self.entries_per_token = payload / rows, entries / rows
        self.model_bytes = model

    def at(self, windows: list[int]) -> SoftLabels:
        return SoftLabels.cat([self.windows[i] for i in windows])


def make_labels(corpus: Corpus, folder: Path, arms: list[str], draw: int) -> dict[str, Labels]:
    """Labels of all ``arms``, in one pass over the teacher's logits; ``draw`` seeds the ones that are drawn."""
    made, missing = {}, []
    for name in arms:
        path = _path(folder, name, draw)
        if path.exists():
            made[name] = torch.load(path, weights_only=False)
        else:
            missing.append(name)
    for name, labels in _pass(corpus, folder, missing, draw).items():
        torch.save(labels, _path(folder, name, draw))
        made[name] = labels
    return made


def _path(folder: Path, name: str, draw: int) -> Path:
    drawn = ARMS[name].codec in ("sample", "threshold")
    return folder / f"labels-{name}-{draw if drawn else 'all'}.pt"


def _pass(corpus: Corpus, folder: Path, arms: list[str], draw: int) -> dict[str, Labels]:
    if not arms:
        return {}
    made = {name: _codec(corpus, folder, ARMS[name], draw) for name in arms}
    parts: dict[str, list[SoftLabels]] = {name: [] for name in arms}
    for window in range(TRAIN_WINDOWS):
        logits = corpus.logits(slice(window, window + 1))
        for name, codec in made.items():
            parts[name].append(codec.select(logits, window.to_bytes(16, "little")))
    return {name: _through_bytes(made[name], parts[name], ARMS[name].renormalise) for name in arms}


def _codec(corpus: Corpus, folder: Path, arm: Arm, draw: int) -> Codec:
    assert arm.codec is not None
    options = dict(arm.options)
    if arm.codec in ("sample", "threshold"):
        options["seed"] = draw
    if arm.shapes:
        options["shapes"] = load_shapes(corpus, folder, arm.shapes, options["k"])
    return codecs.create(arm.codec, corpus.vocab_size, (1.0,), options)


def _through_bytes(codec: Codec, windows: list[SoftLabels], renormalise: bool) -> Labels:
    """Encode and decode, block by block: a student sees what the cache would give it."""
    if codec.learn_rows:
        codec.use_model(codec.learn(SoftLabels.cat(windows)[: codec.learn_rows]))
    decoded, payload = [], 0
    for i in range(0, len(windows), BLOCK_WINDOWS):
        part = windows[i : i + BLOCK_WINDOWS]
        data = np.frombuffer(codec.encode(SoftLabels.cat(part)), np.uint8)
        payload += len(data)
        rows = len(part) * LENGTH
        labels = codec.decode(data, np.array([[0, len(data), rows]]), np.arange(rows))
        decoded += [labels[j * LENGTH : (j + 1) * LENGTH] for j in range(len(part))]
    entries = sum(labels.values.numel() for labels in decoded)
    decoded = [_without_tail(labels) if renormalise else labels for labels in decoded]
    return Labels(decoded, payload, len(codec.model), entries)


def _without_tail(labels: SoftLabels) -> SoftLabels:
    """Top-k as most rivals use it: the entries scaled up to a mass of 1."""
    assert labels.ids is not None
    probs = labels.values.exp().view(len(labels), -1)
    ids = labels.ids.view(len(labels), -1)
    return SoftLabels.weights(ids, probs / probs.sum(1, keepdim=True), vocab_size=labels.vocab_size)
