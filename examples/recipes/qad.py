"""Quantisation-aware distillation: a language model's layers are dropped and its weights rounded to MXFP4, and the
student is healed from a cache of its teacher's labels, a few drawn tokens each."""

from __future__ import annotations

import copy
import pydoc_data.topics
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kdfast import Distiller, cache, kd_loss
from kdfast.recipes import bake, drop_layers, fake_quantize

VOCAB, LENGTH = 128, 64  # ASCII as tokens


def windows(count: int) -> Tensor:
    """(count, LENGTH) ids of the standard library's help topics, each character once."""
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    return torch.tensor(list(text[: count * LENGTH])).view(count, LENGTH)


def batches(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in ids.split(8)]


@torch.no_grad()
def kl(teacher: Any, student: Any, ids: Tensor) -> float:
    return kd_loss(student(input_ids=ids).logits, teacher(input_ids=ids).logits).item()


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    teacher: Any = LlamaForCausalLM(config)
    train, test = windows(1040).split([1008, 32])
    pairs = [{"input_ids": part, "labels": part} for part in train.split(8)]
    Distiller(teacher, lr=5e-3, shift=True).fit(pairs, epochs=3, progress=False)
    teacher.eval()

    student = copy.deepcopy(teacher)
    drop_layers(student, [1])
    names = fake_quantize(student, "mxfp4")  # all but the embedding, which is the output layer's weight too
    before = kl(teacher, student, test)
    with tempfile.TemporaryDirectory() as folder:
        cache.capture(
            teacher, batches(train), folder, vocab_size=VOCAB, codec="sample", draws=23, seed=0, progress=False
        )
        labels = cache.open(folder)
        size = labels.nbytes / train.numel()
        options = {"kd_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0, "divergence": "soft_ce"}  # as draws serve it
        healing = Distiller(student, labels, lr=1e-3, schedule="cosine", **options)
        healing.fit(batches(train), epochs=1, progress=False)
    student.eval()
    healed = kl(teacher, student, test)
    bake(student)
    baked = kl(teacher, student, test)
    print(
        f"KL(teacher, student) of {len(names)} rounded matrices and a layer less: before {before:.3f}, "
        f"healed {healed:.3f}, baked {baked:.3f}, from {size:.1f} bytes per token"
    )


if __name__ == "__main__":
    main()
