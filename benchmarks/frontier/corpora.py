"""Texts with a near student's teacher: its last hidden states in float32, and its logits where they fit on the disk."""

from __future__ import annotations

import os
import pydoc_data.topics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from distances import Distance
from families import load_family, tokenizer_of
from manuals import manuals
from safetensors.torch import load_file, save_file
from teacher import LENGTH
from torch import Tensor

from kdfast.bench.teacher import Corpus

__all__ = ["TableCorpus", "load_corpus"]

TABLE_BYTES = 6e9  # of logits that are kept in a file; more are computed anew whenever they are needed
PROMPT = 32  # tokens of the text that the teacher continues


@dataclass(frozen=True)
class TableCorpus(Corpus):
    """A corpus whose logits lie in a file, (windows, length, vocab) float32, mapped."""

    table: Tensor

    def logits(self, windows: Tensor | slice) -> Tensor:
        return self.table[windows].reshape(-1, self.vocab_size)


def load_corpus(folder: Path, distance: Distance) -> Corpus:
    """The training windows and, after them, the held-out ones; from ``folder``, or made and written there.

    The teacher runs in float32, as the students that are compared with it: a teacher in bfloat16 lies .0007 nats from
    itself in float32, two thirds of what rounding its weights to 8 bits does.
    """
    name = f"{distance.family}-{distance.corpus}-{distance.windows}-{distance.held_out}"
    path = folder / f"corpus-{name}.safetensors"
    if not path.exists():
        model = load_family(folder, distance.family)
        ids = _text(folder, distance, model)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file(_run(model, ids), part)
        part.rename(path)
    corpus = Corpus(**load_file(path), train=distance.windows)
    if len(corpus) * LENGTH * corpus.vocab_size * 4 > TABLE_BYTES:
        return corpus
    table = _table(folder / f"logits-{name}.f32", corpus)
    return TableCorpus(**{f.name: getattr(corpus, f.name) for f in fields(corpus)}, table=table)


def _text(folder: Path, distance: Distance, model: Any) -> Tensor:
    """(windows, length + 1) ids: the windows' tokens and the one that follows each."""
    count = distance.windows + distance.held_out
    texts = manuals(folder) if distance.corpus == "manuals" else list(pydoc_data.topics.topics.values())
    ids = torch.tensor(tokenizer_of(folder, distance.family)("\n".join(texts)).input_ids)
    windows = ids[: (len(ids) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    # Held-out windows come from the last part of the text, spread over it.
    last = len(windows) - len(windows) // 8
    if distance.windows > last or distance.held_out > len(windows) - last:
        raise ValueError(f"{distance.corpus} has {len(windows)} windows, too few for {count}")
    spread = torch.linspace(last, len(windows) - 1, distance.held_out).long()
    chosen = torch.cat([windows[: distance.windows], windows[spread]])
    return _continued(model, chosen) if distance.corpus == "continuation" else chosen


@torch.no_grad()
def _continued(model: Any, windows: Tensor) -> Tensor:
    """The windows' beginnings, each with what the teacher, drawing at temperature 1, makes of it."""
    torch.manual_seed(16)
    state, ids = None, windows[:, :PROMPT]
    while ids.shape[1] < windows.shape[1]:
        fresh = ids if state is None else ids[:, -1:]
        out = model(fresh, past_key_values=state, use_cache=True, logits_to_keep=1)
        state = out.past_key_values
        ids = torch.cat([ids, torch.multinomial(out.logits[:, -1].softmax(1), 1)], 1)
    return ids


@torch.no_grad()
def _run(model: Any, ids: Tensor) -> dict[str, Tensor]:
    hidden = [model.model(part[:, :-1], use_cache=False).last_hidden_state for part in ids.split(4)]
    parts = {"ids": ids[:, :-1], "targets": ids[:, 1:], "hidden": torch.cat(hidden), "head": model.lm_head.weight}
    return {name: tensor.detach().clone().contiguous() for name, tensor in parts.items()}


def _table(path: Path, corpus: Corpus) -> Tensor:
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        table = _map(part, corpus)
        for window in range(len(corpus)):
            table[window] = corpus.logits(slice(window, window + 1))
        part.rename(path)
    return _map(path, corpus)


def _map(path: Path, corpus: Corpus) -> Tensor:
    shape = (len(corpus), LENGTH, corpus.vocab_size)
    return torch.from_file(str(path), shared=True, size=shape[0] * shape[1] * shape[2]).view(shape)
