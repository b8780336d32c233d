"""The student, and its training from one arm's labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from residual import Residual, signed_cross_entropy
from teacher import LENGTH, TRAIN_WINDOWS, Corpus
from torch import Tensor, nn
from torch.nn import functional as F

import kdfast

__all__ = ["Teacher", "evaluate", "train"]

BATCH = 2  # windows
WARM_UP = 60  # steps
LEARNING_RATE = 2e-3
# The target of a batch of windows: labels, labels with a residual, logits, or None for the next tokens alone.
Target = kdfast.SoftLabels | tuple[kdfast.SoftLabels, Residual] | Tensor | None
Teacher = Callable[[list[int], int], Target]  # from windows and epoch


def make_student(vocab_size: int) -> nn.Module:
    """A Llama of 6.9 M parameters, 6.3 M of them in the embedding that it shares with its head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def logits_of(student: nn.Module, ids: Tensor) -> Tensor:
    """(rows, vocab) bfloat16."""
    hidden = student.model(ids).last_hidden_state.reshape(-1, student.config.hidden_size)
    return F.linear(hidden.bfloat16(), student.lm_head.weight.bfloat16())


def train(corpus: Corpus, teacher: Teacher, epochs: int, seed: int) -> nn.Module:
    """Train a student. Initial weights and batches depend on the seed alone, so that arms can be compared in pairs."""
    torch.manual_seed(1000 + seed)
    student = make_student(corpus.vocab_size)
    steps = epochs * (TRAIN_WINDOWS // BATCH)
    matrices = [p for p in student.parameters() if p.dim() > 1]
    vectors = [p for p in student.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for epoch in range(epochs):
        order = torch.randperm(TRAIN_WINDOWS, generator=torch.Generator().manual_seed(7700 + 77 * seed + epoch))
        for batch in order.split(BATCH):
            windows = batch.tolist()
            loss = _loss(logits_of(student, corpus.ids[batch]), teacher(windows, epoch), corpus.targets[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return student


def _loss(logits: Tensor, teacher: Target, targets: Tensor) -> Tensor:
    if teacher is None:
        return F.cross_entropy(logits.float(), targets.reshape(-1))
    if isinstance(teacher, tuple):
        return signed_cross_entropy(logits, *teacher)
    divergence = "soft_ce" if getattr(teacher, "kind", "") == "weights" else "forward_kl"
    return kdfast.kd_loss(logits, teacher, divergence=divergence)


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to a twentieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


@torch.no_grad()
def evaluate(student: nn.Module, corpus: Corpus, windows: int) -> dict[str, float]:
    """Mean held-out KL(teacher || student) and cross-entropy in nats, over the last ``windows`` windows."""
    kl = ce = 0.0
    for window in range(len(corpus.ids) - windows, len(corpus.ids)):
        part = slice(window, window + 1)
        logits = logits_of(student, corpus.ids[part]).float()
        kl += kdfast.kd_loss(logits, corpus.logits(part)).item() / windows
        ce += F.cross_entropy(logits, corpus.targets[part].reshape(-1)).item() / windows
    return {"kl": kl, "ce": ce}
